"""A Dag for each way to wait; a Dag run waits for the workflow run that its conf names."""

from __future__ import annotations

from airflow.sdk import DAG
from waits import COUNTED, COUNTED_INTERVAL

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

for way, arguments in COUNTED.items():
    with DAG(f"counted_{way}", schedule=None):
        DifyWorkflowRunSensor(
            task_id="wait",
            workflow_run_id="{{ dag_run.conf['workflow_run_id'] }}",
            poke_interval=COUNTED_INTERVAL,
            **arguments,
        )
