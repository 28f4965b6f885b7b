"""
### Wait for several Dify workflow runs at once

One mapped sensor waits for each run, and the last task collects the outputs. The param `workflow_run_ids` is the list
of the runs' ids. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        # Without a default: the form asks for it, one id a line.
        "workflow_run_ids": Param(
            type="array",
            items={"type": "string", "minLength": 32},
            minItems=1,
            title="Workflow run ids",
            description="The Dify workflow runs to wait for",
        )
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_workflow_runs_mapped():
    @task
    def workflow_run_ids(params: dict | None = None) -> list[str]:
        return list(params["workflow_run_ids"]) if params else []

    wait = DifyWorkflowRunSensor.partial(
        task_id="wait",
        deferrable=True,
        timeout=3600,
        # The UI names each mapped task by its run, not by a number.
        map_index_template="{{ task.workflow_run_id }}",
        # This Dag needs only the dict of all outputs, not one XCom for each.
        multiple_outputs=False,
    ).expand(workflow_run_id=workflow_run_ids())

    @task
    def collect(outputs: list[dict]) -> int:
        for number, answer in enumerate(outputs):
            print(f"Run {number} returned {sorted(answer)}.")
        return len(list(outputs))

    collect(wait.output)


example_dify_workflow_runs_mapped()
