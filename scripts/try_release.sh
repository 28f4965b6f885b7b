#!/usr/bin/env bash
# Releases dist/ to a package index on this machine, installs it from there with one Airflow, and runs the demo.
# Usage: PYTHON=python3.13 scripts/try_release.sh 3.3 PYTHON_WITH_PYPISERVER_AND_TWINE
set -euo pipefail
cd "$(dirname "$0")/.."
tools=$(dirname "$2")
place=$(mktemp -d)
server=
trap 'if [ -n "$server" ]; then kill "$server"; wait "$server" 2> /dev/null || true; fi; rm -rf "$place"' EXIT

port=$("$2" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
mkdir "$place/packages"
# Only this machine can reach it, so it asks nobody for a password.
"$tools/pypi-server" run --interface 127.0.0.1 --port "$port" --passwords . --authenticate . --disable-fallback \
    "$place/packages" > "$place/server.log" 2>&1 &
server=$!
for _ in $(seq 50); do
    curl --silent --output /dev/null "http://127.0.0.1:$port/simple/" && break
    sleep 0.2
done

export NO_PROXY="127.0.0.1${NO_PROXY:+,$NO_PROXY}"
"$tools/twine" upload --disable-progress-bar --repository-url "http://127.0.0.1:$port/" --username any --password any dist/*
ls "$place/packages"
INDEX="http://127.0.0.1:$port/simple/" scripts/smoke.sh "$1"
