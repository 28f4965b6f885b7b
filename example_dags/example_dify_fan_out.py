"""
### Start a Dify workflow run for each item of a list

Each query becomes a run of its own, at most four at a time. One task collects the outputs, another adds up the tokens.
The workflow has the input `query`. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "queries": Param(
            ["Hello", "Good morning"],
            type="array",
            items={"type": "string", "minLength": 1},
            minItems=1,
            title="Queries",
            description="What to ask the workflow, one query a line",
        )
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_fan_out():
    @task
    def inputs(params: dict | None = None) -> list[dict]:
        return [{"query": query} for query in (params or {})["queries"]]

    run = DifyRunWorkflowOperator.partial(
        task_id="run",
        deferrable=True,
        timeout=3600,
        # How many runs Dify works on at once.
        max_active_tis_per_dagrun=4,
        # The UI names each mapped task by its query, not by a number.
        map_index_template="{{ task.inputs.query }}",
        # This Dag needs only the dict of all outputs, not one XCom for each.
        multiple_outputs=False,
    ).expand(inputs=inputs())

    @task
    def collect(outputs: list[dict]) -> int:
        for number, answer in enumerate(outputs):
            print(f"Run {number} returned {answer}.")
        return len(list(outputs))

    @task
    def count_tokens(runs: list[dict]) -> int:
        tokens = sum(run["total_tokens"] or 0 for run in runs)
        print(f"All runs together used {tokens} tokens.")
        return tokens

    collect(run.output)
    count_tokens(run.output["workflow_run"])


example_dify_fan_out()
