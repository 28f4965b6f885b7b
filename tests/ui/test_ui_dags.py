"""
Every Dag of README, docs and example_dags, triggered in Airflow's UI as a newcomer does.

All forms are submitted before the first run is waited for.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from playwright.sync_api import expect

from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses
from tests.dify_stand_in import API_KEY, DifyStandIn, Start, respond
from tests.ui.airflow_ui import AirflowUI
from tests.ui.dags import DAG_IDS, NEED_AIRFLOW_3
from tests.ui.screenshots import Screenshots

OUTPUTS = {"text": "hello", "summary": "short", "score": 0.75}
FAILING = "failing"
# One of each class, and of each way to wait.
TASKS_WITH_A_LINK = [
    ("example_dify_start_and_wait", "run"),
    ("example_dify_batch", "run"),
    ("example_dify_latest_run", "wait"),
    ("example_dify_workflow_run", "wait"),
    ("waits_without_a_worker", "wait"),
]


def run_id_of(dag_id: str) -> str:
    return f"triggered_{dag_id}"


def titles_of_params(airflow: AirflowProcesses, dag_id: str) -> list[str]:
    """Return the titles of a Dag's params, as Airflow has stored them."""
    newest = "SELECT data FROM serialized_dag WHERE dag_id = ? ORDER BY last_updated DESC LIMIT 1"
    ((data,),) = airflow.query(newest, dag_id)
    return [param["schema"]["__var"]["title"] for _, param in json.loads(data)["dag"]["params"]]


def wait_for_end(airflow: AirflowProcesses, dag_id: str, run_id: str) -> str:
    """Return the state that a Dag run ended in."""
    over = "SELECT state FROM dag_run WHERE dag_id = ? AND run_id = ? AND state IN ('success', 'failed')"
    airflow.wait_for(lambda: len(airflow.query(over, dag_id, run_id)) == 1, seconds=600)
    ((state,),) = airflow.query(over, dag_id, run_id)
    return str(state)


@pytest.fixture(scope="module", autouse=True)
def connection(airflow: AirflowProcesses, dify: DifyStandIn) -> None:
    """The connection of the Dags; the one of ``test_ui.py``, if that ran before."""
    if not airflow.query("SELECT 1 FROM connection WHERE conn_id = 'dify_default'"):
        fields = ["--conn-type", "dify", "--conn-host", dify.base_url, "--conn-password", API_KEY]
        airflow.run("connections", "add", "dify_default", *fields)


def add_run_of_difys_schedule(dify: DifyStandIn) -> None:
    """Add a run to Dify's log that nobody started over the API."""
    run_id = dify.add_run("succeeded", user="", outputs=OUTPUTS, created_at=int(time.time()))
    dify.runs[run_id].triggered_from = "schedule"


@pytest.fixture(scope="module")
def entries(dify: DifyStandIn, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What a user enters into the forms that have no default for it, by Dag and param."""
    # Enough for the rows of the batch, and for all others.
    dify.starts.extend([Start(fields={"outputs": OUTPUTS, "total_tokens": 42})] * 100)
    folder = tmp_path_factory.mktemp("files")
    report, notes = folder / "report.pdf", folder / "notes.txt"
    report.write_bytes(b"%PDF-1.4")
    notes.write_text("hello")
    document = {"id": "d1", "indexing_status": "completed", "error": None}
    dify.misbehave(respond(200, json.dumps({"document": document, "batch": "b1"})), only="/create-by-file")
    dify.misbehave(respond(200, json.dumps({"data": [document]})), only="/indexing-status")
    add_run_of_difys_schedule(dify)
    runs = [dify.add_run("succeeded", outputs=OUTPUTS, total_tokens=42) for _ in range(2)]
    return {
        "example_dify_workflow_run": {"workflow_run_id": runs[0]},
        "example_dify_workflow_runs_mapped": {"workflow_run_ids": "\n".join(runs)},
        "example_dify_batch": {"folder": f"file://{folder}/results"},
        "example_dify_file": {"path": str(report)},
        "example_dify_files": {"inbox": str(folder / "inbox"), "outbox": str(folder / "outbox")},
        "example_dify_knowledge_file": {"dataset_id": "6b3f7c1e-0d0c-4d3e-9f57-0a9e4c1f2b11", "path": str(notes)},
        "example_dify_latest_run": {"since": "2026-01-01 00:00"},
    }


def test_airflow_refuses_only_the_dags_that_say_that_they_need_a_later_one(
    ui: AirflowUI, airflow: AirflowProcesses
) -> None:
    refused = airflow.query("SELECT filename, stacktrace FROM import_error")
    assert {Path(name).stem for name, _ in refused} == (NEED_AIRFLOW_3 if AIRFLOW_2 else set())


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_the_form_of_a_dag_shows_its_params_and_can_be_submitted(
    ui: AirflowUI, airflow: AirflowProcesses, entries: dict[str, dict[str, str]], dag_id: str
) -> None:
    ui.open_trigger_form(dag_id)
    for title in titles_of_params(airflow, dag_id):
        expect(ui.trigger_form.locator("label").filter(has_text=title).first).to_be_visible()
    ui.fill_params(entries.get(dag_id, {}))
    ui.submit_trigger_form(run_id_of(dag_id))


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_a_dag_that_was_triggered_succeeds(airflow: AirflowProcesses, dag_id: str) -> None:
    assert wait_for_end(airflow, dag_id, run_id_of(dag_id)) == "success"
    tasks = airflow.query("SELECT state FROM task_instance WHERE dag_id = ? AND run_id = ?", dag_id, run_id_of(dag_id))
    assert tasks
    assert {state for (state,) in tasks} <= {"success", "skipped"}


@pytest.mark.skipif(AIRFLOW_2, reason="one picture is enough")
def test_the_graph_shows_what_the_readme_does(
    ui: AirflowUI, airflow: AirflowProcesses, screenshots: Screenshots
) -> None:
    dag_id = "example_dify_start_and_wait"
    screenshots.set_times(airflow, run_id_of(dag_id), ["run", "use"])
    ui.page.set_viewport_size({"width": 1280, "height": 560})
    ui.open_run(dag_id, run_id_of(dag_id))
    assert ui.task_states() == {"run": "success", "use": "success"}
    ui.page.get_by_label("Show Graph").click()
    # So that the map in the corner hides no task.
    ui.page.locator(".react-flow__controls-zoomout").dblclick()
    ui.page.mouse.move(0, 0)
    screenshots.take("dag-run", height=560)
    ui.page.get_by_label("Show Grid").click()
    ui.page.set_viewport_size({"width": 1280, "height": 800})


@pytest.mark.skipif(AIRFLOW_2, reason="Airflow 2 starts no Dag on an event")
def test_a_run_of_difys_schedule_starts_the_dag_that_waits_for_such(
    ui: AirflowUI, airflow: AirflowProcesses, dify: DifyStandIn
) -> None:
    add_run_of_difys_schedule(dify)
    used = "SELECT state FROM task_instance WHERE dag_id = 'example_dify_runs_as_events' AND task_id = 'use'"
    airflow.wait_for(lambda: ("success",) in airflow.query(used), seconds=180)


@pytest.mark.parametrize(("dag_id", "task_id"), TASKS_WITH_A_LINK)
def test_the_link_has_its_name_and_place_however_a_task_waits(ui: AirflowUI, dag_id: str, task_id: str) -> None:
    if dag_id not in DAG_IDS:
        pytest.skip("needs Airflow 3")
    ui.open_run(dag_id, run_id_of(dag_id))
    ui.open_task(task_id)
    expect(ui.link("Dify run log")).to_be_visible()


@pytest.mark.skipif(AIRFLOW_2, reason="one picture is enough")
def test_a_failing_runs_log_shows_its_cause_at_1400_pixels(
    ui: AirflowUI, airflow: AirflowProcesses, dify: DifyStandIn, screenshots: Screenshots
) -> None:
    cause = "[Errno 111] Connection refused"
    # Those that are left would succeed.
    dify.starts.clear()
    dify.starts.append(Start("run_streaming_failed"))
    ui.trigger("example_dify_start_and_wait", FAILING)
    ended = "SELECT state FROM task_instance WHERE run_id = ? AND task_id = 'run' AND end_date IS NOT NULL"
    airflow.wait_for(lambda: len(airflow.query(ended, FAILING)) == 1, seconds=300)
    assert airflow.query(ended, FAILING) == [("up_for_retry",)]
    ui.page.set_viewport_size({"width": 1400, "height": 900})
    ui.open_run("example_dify_start_and_wait", FAILING)
    ui.open_task("run")
    # The message as a whole may be longer than its line; its cause has to be there without scrolling.
    shown = ui.page.get_by_text(cause).first
    expect(shown).to_be_in_viewport()
    screenshots.take("failed-run-log", height=720)
