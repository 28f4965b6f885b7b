"""The same rows as mapped tasks and as a batch."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG
from rows import ACTIVE, BATCH, MAPPED, ROWS

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

with DAG(MAPPED, schedule=None):
    # On a busy machine this cluster takes a task for dead now and then, because it is set to notice that soon.
    DifyRunWorkflowOperator.partial(task_id="run", poll_interval=1, retries=3, retry_delay=timedelta(seconds=1)).expand(
        inputs=ROWS
    )

with DAG(BATCH, schedule=None):
    DifyRunWorkflowBatchOperator(
        task_id="run", inputs=ROWS, max_active_runs=ACTIVE, output_path="{{ dag_run.conf['output_path'] }}"
    )
