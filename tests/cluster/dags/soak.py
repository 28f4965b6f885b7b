"""Two hundred tasks that start a run each."""

from __future__ import annotations

from airflow.sdk import DAG
from soak_tasks import ARGUMENTS, DAG_ID, STARTS, WAYS, inputs_of, task_id_of

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

with DAG(DAG_ID, schedule=None):
    for number in range(STARTS):
        DifyRunWorkflowOperator(
            task_id=task_id_of(number), inputs=inputs_of(number), **WAYS[number % len(WAYS)], **ARGUMENTS
        )
