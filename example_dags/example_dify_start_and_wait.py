"""
### Start a Dify workflow run and use what it answers

The workflow has the input `query` and the output `text`. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


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
def example_dify_start_and_wait():
    run = DifyRunWorkflowOperator(
        task_id="run",
        inputs={"query": "{{ params.query }}"},
        timeout=3600,
        # A retry continues with the run of an earlier try, if that run can still succeed.
        retries=2,
    )

    @task
    def use(text: str) -> str:
        print(f"The workflow answered {text!r}.")
        return text

    use(run.output["text"])


example_dify_start_and_wait()
