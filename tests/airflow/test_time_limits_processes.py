"""Airflow's own limits on a task, ``execution_timeout`` above all, on real Airflow processes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_2, AIRFLOW_3_0
from tests.airflow.shared_airflow import SharedAirflow
from tests.dify_stand_in.runs import Started

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task that its own limit has ended"),
]

# Only Airflow 2 ends a deferral at the task's execution_timeout.
TASKS: dict[str, dict[str, Any]] = {"worker": {}}
if AIRFLOW_2:
    TASKS["deferred"] = {"deferrable": True, "retries": 0}
    TASKS["deferred_and_retried"] = {"deferrable": True}
    TASKS["deferred_without_xcoms"] = {"deferrable": True, "do_xcom_push": False, "retries": 0}

DAG = """
import json
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

def tell(context):
    with open({errors!r}, "a") as file:
        error = context["exception"]
        file.write(json.dumps([context["ti"].task_id, type(error).__name__, str(error)]) + "\\n")

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def limited():
    for name, way in json.loads({tasks!r}).items():
        arguments = {{"retries": 1, **way}}
        DifyRunWorkflowOperator(
            task_id=name, dify_conn_id={conn_id!r}, inputs={{}}, poll_interval=1,
            execution_timeout=timedelta(seconds=4), retry_delay=timedelta(seconds=1),
            on_failure_callback=tell, on_retry_callback=tell, **arguments,
        )

limited()
"""


@dataclass
class Ended:
    """What became of a task: its state, its log, its errors, the runs that it started, and those that were stopped."""

    state: str
    log: str
    errors: list[tuple[str, str]]
    started: list[Started]
    stopped: list[str]


@pytest.fixture(scope="module")
def ended(shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    errors = tmp_path_factory.mktemp("errors") / "errors.jsonl"
    errors.touch()
    with shared.scenario("limited", dialect="1.16.1") as scenario:
        dify = scenario.dify
        dify.run_duration = 300.0
        scenario.add_dag(DAG, errors=str(errors), tasks=json.dumps(TASKS))
        scenario.wait_until_over(seconds=400)
        lines = [json.loads(line) for line in errors.read_text().splitlines()]
        logs = shared.airflow.home / "logs" / "dag_id=limited"
        return {
            task_id: Ended(
                state,
                "".join(path.read_text() for path in logs.rglob(f"*task_id={task_id}/*.log")),
                [(kind, text) for name, kind, text in lines if name == task_id],
                [run for run in dify.started if f"/{task_id}/" in run.user],
                [task for task, user in dify.stopped if f"/{task_id}/" in user],
            )
            for task_id, state in scenario.query("task_id, state", "task_instance")
        }


def test_on_a_worker_each_try_stops_its_run_and_the_retry_starts_a_new_one(ended: dict[str, Ended]) -> None:
    task = ended["worker"]
    assert task.state == "failed"
    assert len(task.errors) == 2
    # A run that was stopped is not continued: its record may stay `running`, and the retry would wait for nothing.
    assert len(task.started) == 2
    assert task.stopped == [run.task_id for run in task.started]


if AIRFLOW_2:

    def test_a_deferral_that_took_too_long_stops_its_run(ended: dict[str, Ended]) -> None:
        task = ended["deferred"]
        assert task.state == "failed"
        assert [kind for kind, _ in task.errors] == ["AirflowTaskTimeout"]
        assert task.stopped == [run.task_id for run in task.started]

    def test_after_a_deferral_that_took_too_long_the_retry_continues_the_run(ended: dict[str, Ended]) -> None:
        task = ended["deferred_and_retried"]
        assert [kind for kind, _ in task.errors] == ["AirflowTaskTimeout"] * 2
        assert len(task.started) == 1
        assert "Continuing the run that an earlier try started" in task.log

    def test_a_run_that_no_xcom_names_is_looked_for_and_named_if_it_cannot_be_stopped(ended: dict[str, Ended]) -> None:
        task = ended["deferred_without_xcoms"]
        assert task.state == "failed"
        # It sends no events from which its task id could be learnt.
        assert f"Workflow run {task.started[0].workflow_run_id} goes on: its task id" in task.log
