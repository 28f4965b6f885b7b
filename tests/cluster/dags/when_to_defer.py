"""A Dag for each length of a run and each time after which its task defers."""

from __future__ import annotations

from airflow.sdk import DAG
from deferrals import DEFERRALS, dag_id_of

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

for run_seconds, defer_after in DEFERRALS:
    with DAG(dag_id_of(run_seconds, defer_after), schedule=None):
        DifyRunWorkflowOperator(
            task_id="run",
            inputs={"number": "{{ dag_run.conf['number'] }}"},
            deferrable=True,
            defer_after=defer_after,
            poll_interval=5,
        )
