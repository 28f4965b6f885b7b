"""
Wait on several Dify workflow runs at once, one mapped sensor a run, and collect their outputs.

The ids come from an upstream task here; trigger it with ``{"workflow_run_ids": ["...", "..."]}``.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={"workflow_run_ids": Param([], type="array", description="The Dify workflow runs to wait on")},
    tags=["example", "dify"],
)
def example_dify_workflow_runs_mapped():
    @task
    def workflow_run_ids(params: dict | None = None) -> list[str]:
        return list(params["workflow_run_ids"]) if params else []

    wait = DifyWorkflowRunSensor.partial(
        task_id="wait",
        mode="reschedule",
        poke_interval=5,
        timeout=3600,
        # Each of many outputs in an XCom of its own is more than this Dag needs.
        multiple_outputs=False,
    ).expand(workflow_run_id=workflow_run_ids())

    @task
    def collect(outputs: list[dict]) -> int:
        for number, answer in enumerate(outputs):
            print(f"Run {number} gave {sorted(answer)}.")
        return len(list(outputs))

    collect(wait.output)


example_dify_workflow_runs_mapped()
