"""
Start a Dify workflow run and wait on it in one task, and use one of its outputs in the next.

The workflow takes the input ``query`` and gives the output ``text``. It uses the connection ``dify_default``.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={"query": Param("Hello", type="string", description="What to ask the workflow")},
    tags=["example", "dify"],
)
def example_dify_start_and_wait():
    run = DifyRunWorkflowOperator(
        task_id="run",
        inputs={"query": "{{ params.query }}"},
        poll_interval=2,
        timeout=3600,
        # A retry goes on with the run that an earlier try started, if that can still succeed.
        retries=2,
    )

    @task
    def use(text: str) -> str:
        print(f"The workflow answered {text!r}.")
        return text

    use(run.output["text"])


example_dify_start_and_wait()
