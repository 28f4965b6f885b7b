#!/usr/bin/env bash
# Pins what each constraints file pins, at the newest versions that go together, for every Python that Airflow supports.
set -euo pipefail
cd "$(dirname "$0")/.."

# The latest patch of each Airflow that is tested with.
for airflow in 2.11.2 3.3.2; do
    echo "apache-airflow==$airflow" | uv pip compile --quiet --upgrade --universal --python-version 3.10 \
        --no-annotate --no-header --no-emit-index-url pyproject.toml - \
        --group test --group lint --group build --output-file "constraints/airflow-${airflow%.*}.txt"
done

# What the documentation is made with.
echo "apache-airflow==3.3.2" | uv pip compile --quiet --upgrade --universal --python-version 3.10 \
    --no-annotate --no-header --no-emit-index-url pyproject.toml - --group docs \
    --output-file constraints/airflow-3.3-docs.txt

# What cluster/ runs, around the same Airflow.
uv pip compile --quiet --upgrade --universal --python-version 3.10 --no-annotate --no-header --no-emit-index-url \
    pyproject.toml cluster/requirements.txt --group test --constraints constraints/airflow-3.3.txt \
    --output-file constraints/airflow-3.3-cluster.txt
