"""
### Wait for a Dify workflow run that something else started

The param `workflow_run_id` is the run's id. The next task reports the outputs. The Dag uses the connection
`dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        # Without a default: the form asks for it.
        "workflow_run_id": Param(
            type="string",
            minLength=32,
            title="Workflow run id",
            description="The Dify workflow run to wait for",
        )
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_workflow_run():
    wait = DifyWorkflowRunSensor(
        task_id="wait",
        workflow_run_id="{{ params.workflow_run_id }}",
        deferrable=True,
        timeout=24 * 3600,
        # Dify leaves a run "running" forever if the server that ran it was killed.
        run_timeout=6 * 3600,
    )

    @task
    def report(outputs: dict, run: dict) -> dict:
        # Outputs are named as in the workflow's end node. This takes "text", or the first one.
        answer = outputs.get("text", next(iter(outputs.values()), None))
        print(f"The workflow answered {answer!r} and used {run['total_tokens']} tokens.")
        return {"answer": answer, "total_tokens": run["total_tokens"]}

    report(outputs=wait.output, run=wait.output["workflow_run"])


example_dify_workflow_run()
