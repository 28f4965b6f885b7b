"""
Start a Dify workflow run in one task, wait on it in a sensor, and report its outputs in a third.

Trigger it with ``{"inputs": {"query": "..."}}``, the inputs of the workflow. It uses the connection ``dify_default``.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={"inputs": Param({"query": "Hello"}, type="object", description="The workflow's inputs by name")},
    # With this the template below gives the object itself, not its text.
    render_template_as_native_obj=True,
    tags=["example", "dify"],
)
def example_dify_start_then_sensor():
    start = DifyRunWorkflowOperator(
        task_id="start",
        inputs="{{ params.inputs }}",
        wait_for_completion=False,
    )

    wait = DifyWorkflowRunSensor(
        task_id="wait",
        workflow_run_id=start.output,
        poke_interval=2,
        timeout=3600,
        # Some servers write a run a moment after they started it.
        not_found_grace=60,
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


example_dify_start_then_sensor()
