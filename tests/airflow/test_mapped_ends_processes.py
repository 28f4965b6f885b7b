"""Mapped sensors that the triggerer ends, on real Airflow processes: each one's outputs are its own XComs."""

from __future__ import annotations

import json

import pytest

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER
from tests.airflow.shared_airflow import SharedAirflow

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.long,
    pytest.mark.skipif(not CAN_END_FROM_TRIGGER, reason="this Airflow ends no task on the triggerer"),
]

DAG = """
import pendulum
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def mapped():
    for name, multiple_outputs in (("whole", False), ("apart", True)):
        DifyWorkflowRunSensor.partial(
            task_id=name, dify_conn_id={conn_id!r}, poke_interval=1, end_from_trigger=True,
            multiple_outputs=multiple_outputs,
        ).expand(workflow_run_id={run_ids!r})

mapped()
"""


def test_each_mapped_sensor_has_its_own_outputs(shared: SharedAirflow) -> None:
    with shared.scenario("mapped_ends") as scenario:
        dify = scenario.dify
        run_ids = [dify.add_run("running", "succeeded", outputs={"answer": f"answer {n}"}) for n in range(2)]
        scenario.add_dag(DAG, run_ids=run_ids)
        scenario.wait_until_over(seconds=180)
        states = {state for (state,) in scenario.query("state", "task_instance")}
        assert states == {"success"}, scenario.query("task_id, map_index, event, extra", "log")
        pushed = {
            (task_id, key, map_index): json.loads(value)
            for task_id, key, map_index, value in scenario.query("task_id, key, map_index, value", "xcom")
            if key in ("return_value", "answer")
        }
        expected = {(name, "return_value", n): {"answer": f"answer {n}"} for name in ("whole", "apart") for n in (0, 1)}
        assert pushed == expected | {("apart", "answer", n): f"answer {n}" for n in (0, 1)}
