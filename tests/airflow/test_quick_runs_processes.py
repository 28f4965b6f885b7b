"""Runs that end as soon as their tasks are deferred, on real Airflow processes."""

from __future__ import annotations

import json

import pytest

from tests.airflow.airflow_processes import airflow_processes
from tests.airflow.shared_airflow import Scenario
from tests.dify_stand_in import API_KEY, DifyStandIn

pytestmark = [pytest.mark.airflow_processes, pytest.mark.long]

TASKS = 12

DAG = """
import pendulum
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def quick():
    DifyRunWorkflowOperator.partial(
        task_id="run", dify_conn_id={conn_id!r}, deferrable=True, defer_after=0, poll_interval=1, retries=0
    ).expand(inputs=[{{"item": item}} for item in range({tasks})])
    DifyWorkflowRunSensor.partial(
        task_id="wait", dify_conn_id={conn_id!r}, deferrable=True, poke_interval=1, retries=0
    ).expand(workflow_run_id={run_ids!r})

quick()
"""


def test_a_task_that_could_resume_at_once_is_not_taken_for_dead() -> None:
    # Airflow's executor has to see the end of the worker's process before the task is queued again.
    with DifyStandIn("1.16.1") as dify:
        fields = json.dumps({"conn_type": "dify", "host": dify.base_url, "password": API_KEY})
        dify.run_duration = 0.5
        # Over when the trigger polls first.
        run_ids = [dify.add_run("running", "succeeded") for _ in range(TASKS)]
        # With the settings that Airflow and the package come with.
        with airflow_processes({"AIRFLOW_CONN_DIFY_DEFAULT": fields}, quick=False) as airflow:
            scenario = Scenario(airflow, dify, "quick", "dify_default")
            scenario.add_dag(DAG, tasks=TASKS, run_ids=run_ids)
            scenario.wait_until_over(seconds=400)
            rows = scenario.query("task_id, state", "task_instance")
            assert sorted(rows) == sorted((task_id, "success") for task_id in ("run", "wait") for _ in range(TASKS))
