"""
Wait on a Dify workflow run whose id comes with the Dag run, and use its outputs in the next task.

Trigger it with ``{"workflow_run_id": "..."}``. It uses the connection ``dify_default``.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={"workflow_run_id": Param("", type="string", description="The Dify workflow run to wait on")},
    tags=["example", "dify"],
)
def example_dify_workflow_run():
    wait = DifyWorkflowRunSensor(
        task_id="wait",
        workflow_run_id="{{ params.workflow_run_id }}",
        poke_interval=2,
        timeout=3600,
        # Dify leaves a run "running" for ever if the server that ran it was killed.
        run_timeout=6 * 3600,
    )

    @task
    def report(outputs: dict, run: dict) -> dict:
        # An output has the name that it has in the workflow's end node; this one takes "text", or whatever there is.
        answer = outputs.get("text", next(iter(outputs.values()), None))
        print(f"The workflow answered {answer!r} and used {run['total_tokens']} tokens.")
        return {"answer": answer, "total_tokens": run["total_tokens"]}

    report(outputs=wait.output, run=wait.output["workflow_run"])


example_dify_workflow_run()
