"""
Start a Dify workflow run, and let one of its outputs decide which task comes next.

The workflow takes the input ``query`` and gives the outputs ``text`` and ``score``, a number. It uses the connection
``dify_default``.
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
def example_dify_branch():
    run = DifyRunWorkflowOperator(
        task_id="run",
        inputs={"query": "{{ params.query }}"},
        poll_interval=2,
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
