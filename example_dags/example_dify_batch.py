"""
### Run a Dify workflow over the rows of a file

Each row of `example_dify_batch.csv` becomes a run, at most four at once, all in one task. The results go to a file, one
JSON object a row, which the next task reads. The workflow has the inputs `id` and `query`. The param `folder` is where
the results go: a path, or a URL of any storage that Airflow reaches. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pendulum
from airflow.providers.common.compat.sdk import Param, dag, task  # on Airflow 3 also: from airflow.sdk import ...

from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "folder": Param(
            "file:///tmp/dify-batch",
            type="string",
            minLength=1,
            title="Folder",
            description="Where the results go, such as s3://aws_default@bucket/dify",
        )
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_batch():
    run = DifyRunWorkflowBatchOperator(
        task_id="run",
        inputs=str(Path(__file__).with_name("example_dify_batch.csv")),
        # A file for each Dag run.
        output_path="{{ params.folder }}/{{ run_id }}.jsonl",
        # How many runs Dify works on at once.
        max_active_runs=4,
        # One row in ten may fail; a run that failed is started once more before it counts.
        max_failed_runs=0.1,
        run_retries=1,
        timeout=3600,
        # A retry of the task starts only what is left.
        retries=2,
    )

    @task
    def summarize(batch: dict) -> dict:
        # Imported here, so that the scheduler, which only parses this file, loads no storage.
        from airflow.providers.common.compat.sdk import ObjectStoragePath

        lines = ObjectStoragePath(batch["output_path"]).read_text().splitlines()
        results = [json.loads(line) for line in lines]
        for result in results:
            if result["status"] != "succeeded":
                print(f"Row {result['index']} is {result['status']}: {result['error']}")
        print(f"{batch['succeeded']} of {batch['total']} rows succeeded and used {batch['total_tokens']} tokens.")
        return {"rows": len(results), "tokens": batch["total_tokens"]}

    summarize(run.output["batch"])


example_dify_batch()
