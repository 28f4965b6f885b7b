"""The example Dags run as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.airflow.airflow_runs import dag_bag, dag_file, run_parsed
from tests.conftest import AIRFLOW_SETTINGS
from tests.dify_stand_in import DifyStandIn, Start

Run = Callable[[str, dict[str, object]], str]
EXAMPLES = Path(__file__).parent.parent.parent / "example_dags"


@pytest.fixture
def run_example(airflow_db: Path, dify_connection: str, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run an example in this process, which must succeed, and give what it printed."""

    def run(dag_id: str, conf: dict[str, object]) -> str:
        with dag_file(dag_id, (EXAMPLES / f"{dag_id}.py").read_text(encoding="utf-8")) as path:
            bag = dag_bag(path)
            assert not bag.import_errors
            ran = run_parsed(bag.dags[dag_id], conf)
        said = capfd.readouterr().out
        assert ran.state == "success", said[-5000:]
        return said

    return run


@pytest.mark.usefixtures("airflow_db", "dify_connection")
def test_an_example_runs_from_airflows_command_line(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running", "succeeded", outputs={"text": "hello"}, total_tokens=42)
    conf = json.dumps({"workflow_run_id": run_id})
    done = subprocess.run(
        [sys.executable, "-m", "airflow", "dags", "test", "example_dify_workflow_run", "--conf", conf],
        env={**os.environ, **AIRFLOW_SETTINGS, "AIRFLOW__CORE__DAGS_FOLDER": str(EXAMPLES)},
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-5000:]
    assert "The workflow answered 'hello' and used 42 tokens." in said
    assert "state=success" in said


def test_the_example_passes_an_output_and_the_tokens_to_the_next_task(dify: DifyStandIn, run_example: Run) -> None:
    run_id = dify.add_run("running", "succeeded", outputs={"text": "hello"}, total_tokens=42)
    said = run_example("example_dify_workflow_run", {"workflow_run_id": run_id})
    assert "The workflow answered 'hello' and used 42 tokens." in said


def test_the_mapped_example_collects_every_run(dify: DifyStandIn, run_example: Run) -> None:
    runs = [dify.add_run("succeeded", outputs={f"n{n}": n}) for n in range(3)]
    said = run_example("example_dify_workflow_runs_mapped", {"workflow_run_ids": runs})
    for number in range(3):
        assert f"Run {number} gave ['n{number}']." in said


def queue(dify: DifyStandIn, outputs: dict[str, object], **fields: object) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": outputs, **fields}))


def test_the_example_that_starts_and_waits_passes_an_output_to_the_next_task(
    dify: DifyStandIn, run_example: Run
) -> None:
    queue(dify, {"text": "hello"})
    said = run_example("example_dify_start_and_wait", {"query": "Who is there?"})
    assert "The workflow answered 'hello'." in said
    assert [run.inputs for run in dify.started] == [{"query": "Who is there?"}]


@pytest.mark.parametrize(
    ("conf", "inputs"),
    [
        ({}, {"query": "Hello"}),
        ({"inputs": {}}, {}),
        ({"inputs": {"query": "12", "n": 3, "of": [None, "é"]}}, {"query": "12", "n": 3, "of": [None, "é"]}),
    ],
)
def test_the_example_with_a_sensor_waits_on_the_run_that_it_started(
    dify: DifyStandIn, run_example: Run, conf: dict[str, object], inputs: dict[str, object]
) -> None:
    queue(dify, {"text": "hello"}, total_tokens=42)
    said = run_example("example_dify_start_then_sensor", conf)
    assert "The workflow answered 'hello' and used 42 tokens." in said
    assert [run.inputs for run in dify.started] == [inputs]
    # Only the sensor looked at the run.
    assert len(dify.runs[dify.started[0].workflow_run_id].polls) == 2


def test_the_example_that_fans_out_collects_every_run(dify: DifyStandIn, run_example: Run) -> None:
    for number in range(3):
        queue(dify, {"text": f"answer {number}"})
    said = run_example("example_dify_fan_out", {"queries": ["a", "b", "c"]})
    for number in range(3):
        assert f"gave {{'text': 'answer {number}'}}." in said
    assert sorted(run.inputs["query"] for run in dify.started) == ["a", "b", "c"]
    assert len({run.user for run in dify.started}) == 3


@pytest.mark.parametrize(
    ("score", "told", "not_told"), [(0.75, "Published: hello", "To be"), (0.25, "To be reviewed: hello", "Published:")]
)
def test_the_example_that_branches_follows_an_output(
    dify: DifyStandIn, run_example: Run, score: float, told: str, not_told: str
) -> None:
    queue(dify, {"text": "hello", "score": score})
    said = run_example("example_dify_branch", {"query": "Who is there?"})
    assert told in said
    assert not_told not in said
