#!/usr/bin/env bash
# Installs the built wheel with one Airflow into a clean environment, and runs the demo there, away from the sources.
# Usage: PYTHON=python3.13 scripts/smoke.sh 3.3
set -euo pipefail
cd "$(dirname "$0")/.."
airflow=$1
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

"${PYTHON:-python3}" -m venv "$place/venv"
python="$place/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check uv
"$place/venv/bin/uv" pip install --quiet --python "$python" --constraints "constraints/airflow-$airflow.txt" \
    dist/*.whl "apache-airflow" aiohttp
"$place/venv/bin/uv" pip check --quiet --python "$python"

# The demo, without the package's sources beside it.
mkdir -p "$place/demo/tests"
cp -r scripts example_dags "$place/demo/"
cp -r tests/__init__.py tests/dify_stand_in tests/recorded "$place/demo/tests/"
cd "$place/demo"
"$python" - <<'PYTHON'
import airflow_provider_dify, airflow, sys
assert "site-packages" in airflow_provider_dify.__file__, airflow_provider_dify.__file__
print(f"airflow-provider-dify {airflow_provider_dify.__version__}, Airflow {airflow.__version__}, Python {sys.version.split()[0]}")
PYTHON
"$python" scripts/demo.py > demo.log 2>&1 || { cat demo.log; exit 1; }
tail -n 3 demo.log
