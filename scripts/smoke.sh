#!/usr/bin/env bash
# Installs the built wheel with one Airflow into a clean environment, and runs the demo there, away from the sources.
# Usage: PYTHON=python3.13 scripts/smoke.sh 3.3
# With INDEX set to the address of a package index, it installs the package from there.
set -euo pipefail
cd "$(dirname "$0")/.."
airflow=$1
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT

shopt -s nullglob
wheels=(dist/*.whl)
[ "${#wheels[@]}" = 1 ] || { echo "There must be one wheel in dist/: run make package first." >&2; exit 1; }
[ -f "constraints/airflow-$airflow.txt" ] || {
    echo "There is no Airflow $airflow in constraints/, only: $(cd constraints && echo airflow-*.txt)" >&2; exit 1
}
echo "Installing the wheel with Airflow $airflow into an environment of its own, and running the demo there: 2 or 3 minutes."
if [ -n "${INDEX:-}" ]; then
    wheel=$(basename "${wheels[0]}")
    version=${wheel#*-}
    package=(--index "$INDEX" "airflow-provider-dify==${version%%-*}")
else
    package=("${wheels[0]}")
fi

"${PYTHON:-python3}" -m venv "$place/venv"
python="$place/venv/bin/python"
"$python" -m pip install --quiet --disable-pip-version-check uv
"$place/venv/bin/uv" pip install --quiet --python "$python" --constraints "constraints/airflow-$airflow.txt" \
    "${package[@]}" "apache-airflow" aiohttp
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
"$python" scripts/demo.py
