"""The example Dags run as they are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_2
from tests.airflow.airflow_runs import dag_bag, dag_file, run_parsed
from tests.conftest import AIRFLOW_SETTINGS
from tests.dify_stand_in import DifyStandIn, Start, respond

Run = Callable[..., str]
EXAMPLES = Path(__file__).parent.parent.parent / "example_dags"


@pytest.fixture
def run_example(
    airflow_db: Path, dify_connection: str, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Run an example in this process and return what it printed."""
    # A trigger's first poll then comes at once.
    monkeypatch.setattr("airflow_provider_dify.triggers.dify.random.uniform", lambda low, high: low)

    def run(dag_id: str, conf: dict[str, object], *, state: str = "success") -> str:
        with dag_file(dag_id, (EXAMPLES / f"{dag_id}.py").read_text(encoding="utf-8")) as path:
            # What an example ships lies beside it.
            for shipped in EXAMPLES.glob(f"{dag_id}.csv"):
                shutil.copy(shipped, path.parent)
            bag = dag_bag(path)
            assert not bag.import_errors
            ran = run_parsed(bag.dags[dag_id], conf)
        said = capfd.readouterr().out
        assert ran.state == state, said[-5000:]
        return said

    return run


@pytest.mark.long
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


@pytest.mark.long
def test_the_mapped_example_collects_every_run(dify: DifyStandIn, run_example: Run) -> None:
    runs = [dify.add_run("succeeded", outputs={f"n{n}": n}) for n in range(3)]
    said = run_example("example_dify_workflow_runs_mapped", {"workflow_run_ids": runs})
    for number in range(3):
        assert f"Run {number} returned ['n{number}']." in said


def queue(dify: DifyStandIn, outputs: dict[str, object], **fields: object) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": outputs, **fields}))


@pytest.mark.long
def test_the_example_that_starts_and_waits_passes_an_output_to_the_next_task(
    dify: DifyStandIn, run_example: Run
) -> None:
    queue(dify, {"text": "hello"})
    said = run_example("example_dify_start_and_wait", {"query": "Who is there?"})
    assert "The workflow answered 'hello'." in said
    assert [run.inputs for run in dify.started] == [{"query": "Who is there?"}]


@pytest.mark.long
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


@pytest.mark.long
def test_the_example_that_fans_out_collects_every_run(dify: DifyStandIn, run_example: Run) -> None:
    for number in range(3):
        fields = {"outputs": {"text": f"answer {number}"}, "total_tokens": 14}
        dify.starts.append(Start(fields=fields))
    said = run_example("example_dify_fan_out", {"queries": ["a", "b", "c"]})
    for number in range(3):
        assert f"returned {{'text': 'answer {number}'}}." in said
    assert "All runs together used 42 tokens." in said
    assert sorted(run.inputs["query"] for run in dify.started) == ["a", "b", "c"]
    assert len({run.user for run in dify.started}) == 3


def test_the_example_with_a_batch_runs_every_row_of_its_file(
    dify: DifyStandIn, run_example: Run, tmp_path: Path
) -> None:
    failed = Start("run_streaming_failed")
    answered = [Start(fields={"outputs": {"text": f"answer {number}"}, "total_tokens": 10}) for number in range(50)]
    # A run that fails is started once more.
    dify.starts.extend([*answered[:3], failed, *answered[3:]])
    said = run_example("example_dify_batch", {"folder": str(tmp_path / "results")})
    assert "50 of 50 rows succeeded and used 500 tokens." in said
    (results,) = (tmp_path / "results").iterdir()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(50))
    assert sorted(line["attempts"] for line in lines) == [1] * 49 + [2]
    asked = [run.inputs for run in dify.started]
    assert {"id": "T-1004", "query": "I was charged twice for the rain jacket, please check."} in asked
    assert len({run.user for run in dify.started}) == len(asked)


@pytest.mark.long
@pytest.mark.parametrize(
    ("score", "shown", "not_shown"),
    [(0.75, "Published: hello", "To be"), (0.25, "To be reviewed: hello", "Published:")],
)
def test_the_example_that_branches_follows_an_output(
    dify: DifyStandIn, run_example: Run, score: float, shown: str, not_shown: str
) -> None:
    queue(dify, {"text": "hello", "score": score})
    said = run_example("example_dify_branch", {"query": "Who is there?"})
    assert shown in said
    assert not_shown not in said


@pytest.mark.long
def test_the_example_with_a_file_starts_a_run_with_the_uploaded_file(
    dify: DifyStandIn, run_example: Run, tmp_path: Path
) -> None:
    report = tmp_path / "report.pdf"
    report.write_bytes(b"%PDF-1.4")
    queue(dify, {"text": "a report"})
    said = run_example("example_dify_file", {"path": str(report)})
    assert "The workflow answered 'a report'." in said
    (started,) = dify.started
    assert started.inputs["document"]["transfer_method"] == "local_file"
    assert started.user == next(iter(dify.upload_users.values()))


def test_the_example_with_files_takes_a_folder_to_another(dify: DifyStandIn, run_example: Run, tmp_path: Path) -> None:
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    for name in ("a.txt", "b.txt"):
        (inbox / name).write_text(name)

    def outputs_of(run: Any) -> dict[str, Any]:
        name, content = dify.uploads[run.inputs["report"]["upload_file_id"]]
        return {"file": dify.files.make(name, content.upper())}

    dify.outputs_of = outputs_of
    run_example("example_dify_files", {"inbox": str(inbox), "outbox": str(outbox)})
    (folder,) = outbox.iterdir()
    found = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.txt")}
    assert found == {"0/a.txt": "A.TXT", "1/b.txt": "B.TXT", "mapped-0/a.txt": "A.TXT", "mapped-1/b.txt": "B.TXT"}


@pytest.mark.long
def test_the_example_with_an_alert_says_why_the_run_failed(dify: DifyStandIn, run_example: Run) -> None:
    dify.starts.append(Start(recording="run_streaming_failed", statuses=("failed",)))
    said = run_example("example_dify_alert", {"query": "Who is there?"}, state="failed")
    run_id = dify.started[0].workflow_run_id
    assert f"Alert: task run: Dify run {run_id} ended as failed: " in said


@pytest.mark.long
def test_the_example_with_a_knowledge_file_waits_until_it_is_indexed(
    dify: DifyStandIn, run_example: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Which runs no workflow, and is refused by all methods of the hook that would.
    connection = {"conn_type": "dify", "host": dify.base_url, "password": "dataset-key-of-the-stand-in"}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_KNOWLEDGE", json.dumps(connection))
    notes = tmp_path / "notes.txt"
    notes.write_text("hello")
    dify.misbehave(
        respond(200, json.dumps({"document": {"id": "d1"}, "batch": "b1"})),
        respond(200, json.dumps({"data": [{"id": "d1", "indexing_status": "completed", "error": None}]})),
    )
    dataset = "6b3f7c1e-0d0c-4d3e-9f57-0a9e4c1f2b11"
    run_example("example_dify_knowledge_file", {"dataset_id": dataset, "path": str(notes)})
    assert [request.path for request in dify.requests] == [
        f"/v1/datasets/{dataset}/document/create-by-file",
        f"/v1/datasets/{dataset}/documents/b1/indexing-status",
    ]


def test_every_example_has_a_form_that_can_be_submitted(airflow_db: Path) -> None:
    for path in EXAMPLES.glob("*.py"):
        bag = dag_bag(path)
        if AIRFLOW_2 and path.stem == "example_dify_runs_as_events":
            # Airflow 2 starts no Dag on an event.
            assert bag.import_errors
            continue
        assert not bag.import_errors
        (dag,) = bag.dags.values()
        assert dag.doc_md
        for name in dag.params:
            param = dag.params.get_param(name)
            schema = param.schema
            assert schema["title"]
            assert param.description
            assert schema["type"] == "object" or schema.get("minLength") or schema.get("minItems")


@pytest.mark.long
def test_the_example_with_the_latest_run_waits_for_a_run_of_difys_schedule(dify: DifyStandIn, run_example: Run) -> None:
    runs = [dify.add_run("succeeded", user="u", outputs={"text": "hi"}, created_at=int(time.time())) for _ in range(2)]
    dify.runs[runs[0]].triggered_from = "schedule"
    said = run_example("example_dify_latest_run", {"since": "2026-01-01T00:00:00Z"})
    assert f"Run {runs[0]} of Dify's schedule returned ['text']." in said
