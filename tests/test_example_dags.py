"""The example Dags run as they are, from Airflow's command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import AIRFLOW_SETTINGS
from tests.local_dify import LocalDify

EXAMPLES = Path(__file__).parent.parent / "example_dags"


def run_example(dag_id: str, conf: dict[str, object]) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "dags", "test", dag_id, "--conf", json.dumps(conf)],
        env={**os.environ, **AIRFLOW_SETTINGS, "AIRFLOW__CORE__DAGS_FOLDER": str(EXAMPLES)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    return said


@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_the_example_hands_an_output_and_the_tokens_on(dify: LocalDify) -> None:
    run_id = dify.add_run("running", "succeeded", outputs={"text": "hello"}, total_tokens=42)
    said = run_example("example_dify_workflow_run", {"workflow_run_id": run_id})
    assert "The workflow answered 'hello' and used 42 tokens." in said
    assert "state=success" in said


@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_the_mapped_example_collects_every_run(dify: LocalDify) -> None:
    runs = [dify.add_run("succeeded", outputs={f"n{n}": n}) for n in range(3)]
    said = run_example("example_dify_workflow_runs_mapped", {"workflow_run_ids": runs})
    for number in range(3):
        assert f"Run {number} gave ['n{number}']." in said
    assert "state=success" in said
