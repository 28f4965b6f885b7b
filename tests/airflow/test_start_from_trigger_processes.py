"""What a real triggerer makes of templates, and how long a task waits for one that gets no answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow import triggerer_templates as known
from tests.airflow.airflow_processes import AirflowProcesses, airflow_processes
from tests.dify_stand_in import API_KEY, DifyStandIn

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.long,
    pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="this Airflow cannot start a task on the triggerer"),
]

# Renders as the package does, and writes down what came of it instead of asking Dify.
RECORDING = """
import json
import os

from airflow.triggers.base import TaskFailedEvent, TaskSuccessEvent
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger


class RecordingTrigger(DifyWorkflowRunTrigger):
    render_timeout = 30.0

    async def run(self):
        async for event in super().run():
            if not isinstance(event, TaskSuccessEvent):
                self.record("failed", event.payload["message"])
                event = TaskFailedEvent()
            yield event

    async def _wait(self):
        self.record("rendered", self.workflow_run_id)
        return TaskSuccessEvent()

    def record(self, *what):
        with open(os.environ["RECORDED"], "a") as file:
            file.write(json.dumps([self.task_id, *what]) + "\\n")
"""

DAGS = """
import json
import os
from dataclasses import replace
from datetime import timedelta

import pendulum
from airflow.sdk import DAG, task

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor
from airflow_provider_dify.triggers import templates


def tell(context):
    with open(os.environ["RECORDED"], "a") as file:
        error = context["exception"]
        file.write(json.dumps([context["ti"].task_id, type(error).__name__, str(error)]) + "\\n")


def render(name, template):
    wait = DifyWorkflowRunSensor(task_id=name, workflow_run_id=template, start_from_trigger=True)
    wait.start_trigger_args = replace(wait.start_trigger_args, trigger_cls="recording.RecordingTrigger")
    upstream >> wait


with DAG(
    {known.DAG_ID!r},
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1),
    params={known.PARAMS!r},
    user_defined_macros={{"a_macro_of_the_dag": 1}},
):
    @task
    def up():
        return {known.UP!r}

    @task(multiple_outputs=True)
    def pieces():
        return {known.PIECES!r}

    @task
    def many(n):
        return {known.MANY!r}[n]

    upstream = [up(), pieces(), many.expand(n=[0, 1])]
    for name, template in json.loads({works!r}).items():
        render(name, template)
    # What the package refuses.
    checked, templates.unknown_piece = templates.unknown_piece, lambda template: None
    for name, template in json.loads({refused!r}).items():
        render(name, template)

with DAG("limits", schedule="@once", start_date=pendulum.datetime(2026, 1, 1)):
    arguments = {{"start_from_trigger": True, "poke_interval": 2, "on_failure_callback": tell}}
    hanging = "{{{{ ti.xcom_pull('nosuch') or 'x' }}}}"
    DifyWorkflowRunSensor(task_id="hanging", workflow_run_id=hanging, timeout=5, **arguments)
    # Shorter than the two minutes that Airflow's own limit comes after the sensor's.
    DifyWorkflowRunSensor(
        task_id="running", workflow_run_id={run!r}, execution_timeout=timedelta(seconds=90), **arguments
    )
templates.unknown_piece = checked
"""


LINKS_OF_WAITING_TASKS = """
SELECT value FROM xcom JOIN task_instance USING (dag_id, task_id, run_id)
WHERE task_id = 'running' AND key = 'dify-run-log' AND state = 'deferred'
"""


def numbered(prefix: str, rows: Any) -> dict[str, str]:
    return {f"{prefix}_{number:03}": template for number, template in enumerate(rows)}


WORKS = numbered("works", known.WORKS)
HANGS = numbered("hangs", known.HANGS)
FAILS = numbered("fails", known.FAILS)
EMPTY = numbered("empty", known.EMPTY)


@pytest.fixture(scope="module")
def airflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AirflowProcesses]:
    """An Airflow in which every task has ended, and had its link while it waited."""
    modules = tmp_path_factory.mktemp("modules")
    (modules / "recording.py").write_text(RECORDING)
    with DifyStandIn() as dify:
        environment = {
            "PYTHONPATH": str(modules),
            "RECORDED": str(modules / "recorded.jsonl"),
            "AIRFLOW_CONN_C": json.dumps(known.CONNECTION),
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps({"conn_type": "dify", "host": dify.base_url, "password": API_KEY}),
            **{f"AIRFLOW_VAR_{name.upper()}": value for name, value in known.VARIABLES.items()},
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "512",
            "AIRFLOW__CORE__DEFAULT_POOL_TASK_SLOT_COUNT": "512",
        }
        with airflow_processes(environment) as airflow:
            dags = DAGS.format(
                known=known,
                works=json.dumps(WORKS),
                refused=json.dumps(HANGS | FAILS | EMPTY),
                run=dify.add_run(*["running"] * 8, "succeeded"),
            )
            (airflow.dags / "dags.py").write_text(dags)
            airflow.wait_for(lambda: len(airflow.query("SELECT 1 FROM serialized_dag")) == 2, seconds=120)
            run = {"dag_run_id": known.RUN_ID, "logical_date": known.LOGICAL_DATE, "conf": known.CONF}
            airflow.ask_api("POST", f"/dags/{known.DAG_ID}/dagRuns", run)
            airflow.wait_for(lambda: bool(airflow.query(LINKS_OF_WAITING_TASKS)), seconds=120)
            airflow.wait_for(
                lambda: len(airflow.query("SELECT 1 FROM dag_run WHERE state IN ('success', 'failed')")) == 2,
                seconds=300,
            )
            yield airflow


@pytest.fixture(scope="module")
def recorded(airflow: AirflowProcesses) -> dict[str, list[str]]:
    """What came of each template, by task: how it ended, and the text or the message."""
    with open(airflow.environment["RECORDED"], encoding="utf-8") as file:
        return {task_id: what for task_id, *what in map(json.loads, file)}


@pytest.mark.parametrize(("task_id", "template"), WORKS.items())
def test_a_template_that_the_package_takes_is_rendered(
    recorded: dict[str, list[str]], task_id: str, template: str
) -> None:
    assert recorded[task_id] == ["rendered", known.WORKS[template].replace("{task_id}", task_id)]


@pytest.mark.parametrize(("task_id", "template"), HANGS.items())
def test_a_template_that_gets_no_answer_ends_when_its_time_is_over(
    recorded: dict[str, list[str]], task_id: str, template: str
) -> None:
    message = "Airflow did not respond for 30 seconds to what the sensor's templates ask for on the triggerer."
    assert recorded[task_id] == ["failed", message], template


@pytest.mark.parametrize(("task_id", "template"), FAILS.items())
def test_a_template_that_fails_says_why(recorded: dict[str, list[str]], task_id: str, template: str) -> None:
    end, message = recorded[task_id]
    assert end == "failed", template
    assert message.endswith(": the sensor's templates could not be rendered on the triggerer.")


@pytest.mark.parametrize(("task_id", "template"), EMPTY.items())
def test_what_the_package_calls_empty_there_is_empty(
    recorded: dict[str, list[str]], task_id: str, template: str
) -> None:
    assert recorded[task_id] == ["rendered", ""], template


def test_no_task_waits_for_a_template_longer_than_its_timeout(recorded: dict[str, list[str]]) -> None:
    kind, message = recorded["hanging"]
    # Airflow's own limit, two minutes later, would have ended it with another error.
    assert kind == "DifyError"
    # What is left of its five seconds when the triggerer gets to it.
    assert re.match("Airflow did not respond for [0-5] seconds to what the sensor's templates ask for", message)


def test_an_execution_timeout_takes_nothing_away_from_the_sensors_timeout(airflow: AirflowProcesses) -> None:
    assert airflow.query("SELECT state FROM task_instance WHERE task_id = 'running'") == [("success",)]


def test_a_task_has_its_link_while_it_waits_and_airflow_logs_no_error_about_it(airflow: AirflowProcesses) -> None:
    # The fixture has waited for it.
    (link,) = airflow.query("SELECT value FROM xcom WHERE task_id = 'running' AND key = 'dify-run-log'")
    assert re.fullmatch(r'"http://127\.0\.0\.1:\d+/app/[0-9a-f-]{36}/logs"', link[0])
    for path in (airflow.home / "logs").rglob("*.log"):
        assert "XCom not found" not in path.read_text(errors="replace"), path
