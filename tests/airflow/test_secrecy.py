"""Neither API key nor header is in anything that a run of a Dag leaves behind, at the fullest log level."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.airflow.airflow_runs import without_masking
from tests.conftest import AIRFLOW_HOME, AIRFLOW_SETTINGS
from tests.dify_stand_in import DifyStandIn, replay, respond

# Unlike the stand-in's usual key, nothing else on the machine reads like it.
KEY = "app-pBc7-a-key-to-search-for"
HEADER = "Qx3-a-header-to-search-for"

# Each with a mode of the sensor.
ENDINGS = {"succeeded": "poke", "refused": "poke", "broken": "poke", "failed": "reschedule"}

DAG = """
import pendulum
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

@dag(schedule=None, start_date=pendulum.datetime(2026, 1, 1), params={{"runs": {{}}}})
def secrecy():
    for ending, mode in {endings!r}.items():
        DifyWorkflowRunSensor(
            task_id=ending, dify_conn_id=f"dify_{{ending}}", poke_interval=0.1, mode=mode,
            workflow_run_id=f"{{{{{{{{ params.runs.{{ending}} }}}}}}}}",
        )

secrecy()
"""


SEARCH = """
import pathlib, sys
secrets = [secret.encode() for secret in sys.argv[1:3]]
for folder in sys.argv[3:]:
    for path in pathlib.Path(folder).rglob("*"):
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
            print(path)
print("searched")
"""


@pytest.mark.long
@pytest.mark.usefixtures("airflow_db")
def test_runs_leave_the_key_nowhere(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        servers = {ending: stack.enter_context(DifyStandIn()) for ending in ENDINGS}
        for dify in servers.values():
            dify.api_keys = {KEY}
        runs = {
            ending: dify.add_run("running", "succeeded" if ending == "succeeded" else "failed")
            for ending, dify in servers.items()
        }
        servers["refused"].misbehave_always(replay("auth_bad_key"))
        # A server that gives back what it was sent.
        servers["broken"].misbehave(
            respond(500, json.dumps({"message": f"no such key: {KEY}, {HEADER}", "code": "unknown"}))
        )
        (tmp_path / "secrecy.py").write_text(DAG.format(endings=ENDINGS))
        done = subprocess.run(
            [sys.executable, "-m", "airflow", "dags", "test", "secrecy", "--conf", json.dumps({"runs": runs})],
            env={
                **os.environ,
                **AIRFLOW_SETTINGS,
                "AIRFLOW__CORE__DAGS_FOLDER": str(tmp_path),
                "AIRFLOW__LOGGING__LOGGING_LEVEL": "DEBUG",
                # Airflow's own masking would hide what we let through.
                "AIRFLOW__CORE__HIDE_SENSITIVE_VAR_CONN_FIELDS": "False",
                **{
                    f"AIRFLOW_CONN_DIFY_{ending.upper()}": json.dumps(
                        {
                            "conn_type": "dify",
                            "host": dify.base_url,
                            "password": KEY,
                            "extra": {"headers": {"X-Key": HEADER}},
                        }
                    )
                    for ending, dify in servers.items()
                },
            },
            capture_output=True,
            text=True,
            check=False,
        )
        said = without_masking(done.stdout + done.stderr)
        for ending, dify in servers.items():
            assert len(dify.requests) >= (1 if ending == "refused" else 2), said[-3000:]
            assert dify.requests[0].headers["Authorization"] == f"Bearer {KEY}"
            assert dify.requests[0].headers["X-Key"] == HEADER
            assert runs[ending] in said
    assert "DEBUG" in said.upper()
    assert KEY not in said
    assert HEADER not in said
    # By a process of its own: to read a database that this one has open would lift SQLite's locks on it.
    search = [sys.executable, "-c", SEARCH, KEY, HEADER, str(AIRFLOW_HOME), str(tmp_path)]
    found = subprocess.run(search, check=True, capture_output=True, text=True)
    assert found.stdout == "searched\n"
