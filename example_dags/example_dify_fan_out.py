"""
Start a Dify workflow run for each item of an upstream task's list, and collect the outputs.

Trigger it with ``{"queries": ["...", "..."]}``; each becomes the input ``query`` of a run of its own. It uses the
connection ``dify_default``.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={"queries": Param(["Hello", "Good morning"], type="array", description="What to ask the workflow")},
    tags=["example", "dify"],
)
def example_dify_fan_out():
    @task
    def inputs(params: dict | None = None) -> list[dict]:
        return [{"query": query} for query in (params or {})["queries"]]

    run = DifyRunWorkflowOperator.partial(
        task_id="run",
        poll_interval=2,
        timeout=3600,
        # How many runs Dify has to do at once.
        max_active_tis_per_dagrun=4,
        # Each of many outputs in an XCom of its own is more than this Dag needs.
        multiple_outputs=False,
    ).expand(inputs=inputs())

    @task
    def collect(outputs: list[dict]) -> int:
        for number, answer in enumerate(outputs):
            print(f"Run {number} gave {answer}.")
        return len(list(outputs))

    collect(run.output)


example_dify_fan_out()
