#!/usr/bin/env bash
# Pins what each constraints file pins, for every Python from the named one on that Airflow supports: the newest versions
# that go together, but with lowest-direct the lowest that pyproject.toml declares. Run it after each change there.
set -euo pipefail
cd "$(dirname "$0")/.."

# Usage: pin <name of the file> <Python> <option of uv>... <<< "<further requirements>"
pin() {
    uv pip compile --quiet --upgrade --universal --python-version "$2" --no-annotate --no-header \
        --no-emit-index-url pyproject.toml - --output-file "constraints/airflow-$1.txt" "${@:3}"
}

# The latest patch of each Airflow that is tested with.
all=(--group test --group lint --group build)
pin 2.11 3.10 "${all[@]}" <<< "apache-airflow==2.11.2"
# Its Cadwyn imports what FastAPI 0.118 no longer has, PyJWT 2.11 refuses its tokens, which name no issuer, and
# universal-pathlib 0.3 refuses its object storage.
pin 3.0 3.10 "${all[@]}" <<< "apache-airflow==3.0.6
fastapi<0.118
pyjwt<2.11
universal-pathlib<0.3"
pin 3.1 3.10 "${all[@]}" <<< "apache-airflow==3.1.8"
# FastAPI 0.137 refuses its API's unions that a function tells apart, as Airflow 3.3 says itself. svcs 26.2 takes its
# registry from the API of dag.test(), which is told of its end too early.
pin 3.2 3.10 "${all[@]}" <<< "apache-airflow==3.2.2
fastapi<0.137
svcs<26.2"
pin 3.3 3.10 "${all[@]}" <<< "apache-airflow==3.3.2"

# The next Airflow's beta, named whole, because nothing else may be a pre-release.
pin 3.4-beta 3.11 --group test <<< "apache-airflow==3.4.0b2
apache-airflow-core==3.4.0b2
apache-airflow-task-sdk==1.4.0b2"

pin 2.11-lowest-direct 3.10 --group test --resolution lowest-direct <<< "apache-airflow
universal-pathlib<0.3"
pin 3.3-lowest-direct 3.13 --group test --resolution lowest-direct <<< "apache-airflow==3.3.2"

# What the documentation is made with.
pin 3.3-docs 3.10 --group docs <<< "apache-airflow==3.3.2"

# What tests/cluster/ runs, around the same Airflow.
pin 3.3-cluster 3.10 tests/cluster/requirements.txt --group test --constraints constraints/airflow-3.3.txt < /dev/null
