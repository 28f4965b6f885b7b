"""The example Dags run as they are, from Airflow's command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import AIRFLOW_SETTINGS
from tests.local_dify import LocalDify, Start

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


def queue(dify: LocalDify, outputs: dict[str, object], **fields: object) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": outputs, **fields}))


@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_the_example_that_starts_and_waits_hands_an_output_on(dify: LocalDify) -> None:
    queue(dify, {"text": "hello"})
    said = run_example("example_dify_start_and_wait", {"query": "Who is there?"})
    assert "The workflow answered 'hello'." in said
    assert "state=success" in said
    assert [run.inputs for run in dify.started] == [{"query": "Who is there?"}]


@pytest.mark.parametrize(
    ("conf", "inputs"),
    [
        ({}, {"query": "Hello"}),
        ({"inputs": {}}, {}),
        ({"inputs": {"query": "12", "n": 3, "of": [None, "é"]}}, {"query": "12", "n": 3, "of": [None, "é"]}),
    ],
)
@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_the_example_with_a_sensor_waits_on_the_run_that_it_started(
    dify: LocalDify, conf: dict[str, object], inputs: dict[str, object]
) -> None:
    queue(dify, {"text": "hello"}, total_tokens=42)
    said = run_example("example_dify_start_then_sensor", conf)
    assert "The workflow answered 'hello' and used 42 tokens." in said
    assert "state=success" in said
    assert [run.inputs for run in dify.started] == [inputs]
    # Only the sensor looked at the run.
    assert len(dify.runs[dify.started[0].workflow_run_id].polls) == 2


@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_the_example_that_fans_out_collects_every_run(dify: LocalDify) -> None:
    for number in range(3):
        queue(dify, {"text": f"answer {number}"})
    said = run_example("example_dify_fan_out", {"queries": ["a", "b", "c"]})
    for number in range(3):
        assert f"gave {{'text': 'answer {number}'}}." in said
    assert "state=success" in said
    assert sorted(run.inputs["query"] for run in dify.started) == ["a", "b", "c"]
    assert len({run.user for run in dify.started}) == 3


@pytest.mark.parametrize(
    ("score", "told", "not_told"), [(0.75, "Published: hello", "To be"), (0.25, "To be reviewed: hello", "Published:")]
)
@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_the_example_that_branches_follows_an_output(dify: LocalDify, score: float, told: str, not_told: str) -> None:
    queue(dify, {"text": "hello", "score": score})
    said = run_example("example_dify_branch", {"query": "Who is there?"})
    assert told in said
    assert not_told not in said
    assert "state=success" in said
