"""
### Start a Dify workflow run in one task and wait in another

The third task reports the outputs. The param `inputs` holds the workflow's inputs by name. The Dag uses the connection
`dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "inputs": Param(
            {"query": "Hello"},
            type="object",
            title="Inputs",
            description="The workflow's inputs by name",
        )
    },
    # The template below then renders to the object itself, not to its text.
    render_template_as_native_obj=True,
    doc_md=__doc__,
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


example_dify_start_then_sensor()
