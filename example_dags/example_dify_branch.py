"""
### Let an output of a Dify workflow run choose the next task

The workflow has the input `query` and the outputs `text` and `score`, a number. A high score leads to the task
`publish`, any other to `review`. The Dag uses the connection `dify_default`.
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
def example_dify_branch():
    run = DifyRunWorkflowOperator(
        task_id="run",
        inputs={"query": "{{ params.query }}"},
        timeout=3600,
    )

    @task.branch
    def choose(score: float) -> str:
        return "publish" if score >= 0.5 else "review"

    @task
    def publish(text: str) -> None:
        print(f"Published: {text}")

    @task
    def review(text: str) -> None:
        print(f"To be reviewed: {text}")

    choose(run.output["score"]) >> [publish(run.output["text"]), review(run.output["text"])]


example_dify_branch()
