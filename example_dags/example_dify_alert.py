"""
### Send an alert that says why a Dify workflow run failed

A callback tells a failed run from all other trouble. Here it prints; let yours write to your chat or pager.

The workflow has the input `query`. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.exceptions import DifyWorkflowRunFailed
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


def alert(context):
    task_id, error = context["ti"].task_id, context.get("exception")
    if isinstance(error, DifyWorkflowRunFailed) and error.run:
        node = error.failed_node["title"] if error.failed_node else "unknown"
        print(f"Alert: task {task_id}: Dify run {error.run.id} ended as {error.run.status}: {error.run.error}")
        print(f"The node that failed: {node}")
    else:
        print(f"Alert: task {task_id}: {error}")


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "query": Param(
            "Hello",
            type="string",
            minLength=1,
            title="Query",
            description="What to ask the workflow",
        )
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_alert():
    DifyRunWorkflowOperator(
        task_id="run",
        inputs={"query": "{{ params.query }}"},
        timeout=3600,
        on_failure_callback=alert,
    )


example_dify_alert()
