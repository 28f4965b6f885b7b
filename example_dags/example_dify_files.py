"""
### Run a Dify workflow on each file of a folder

The batch gives each text file of the folder `inbox` to a workflow with a file input named `report`, and saves the files
that it returns in the folder `outbox`. The second task does the same with mapped tasks, one for each file. Both folders
may be on any storage, such as `s3://aws_default@bucket/inbox`. The Dag uses the connection `dify_default`.
"""

from __future__ import annotations

import pendulum
from airflow.providers.common.compat.sdk import (  # on Airflow 3 also: from airflow.sdk import ...
    ObjectStoragePath,
    Param,
    dag,
    task,
)

from airflow_provider_dify.files import DifyFile
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator


@dag(
    schedule=None,
    start_date=pendulum.datetime(2026, 1, 1, tz="UTC"),
    params={
        "inbox": Param(type="string", minLength=1, title="Inbox", description="The folder of the files"),
        "outbox": Param(type="string", minLength=1, title="Outbox", description="The folder for the results"),
    },
    doc_md=__doc__,
    tags=["example", "dify"],
)
def example_dify_files():
    batch = DifyRunWorkflowBatchOperator(
        task_id="batch",
        inputs=DifyFile.each("{{ params.inbox }}/*.txt", field="report"),
        output_files="{{ params.outbox }}/{{ run_id }}/{index}",
        max_active_runs=4,
        timeout=3600,
    )

    @task
    def list_files(params: dict | None = None) -> list[str]:
        return sorted(str(path) for path in ObjectStoragePath((params or {})["inbox"]).glob("*.txt"))

    mapped = DifyRunWorkflowOperator.partial(
        task_id="mapped",
        output_files="{{ params.outbox }}/{{ run_id }}/mapped-{{ ti.map_index }}",
        timeout=3600,
    ).expand(inputs=list_files().map(lambda path: {"report": DifyFile(path)}))

    batch >> mapped


example_dify_files()
