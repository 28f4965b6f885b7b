"""Three hundred deferrable waits, and fifty tasks that start a run each and wait for it."""

from __future__ import annotations

import hashlib
import json
from datetime import timedelta

from airflow.sdk import dag, task
from waits import DAG_ID, OPERATORS, RETRIES, SENSORS, waits, workflow_run_id

from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

RETRYING = {"retries": RETRIES, "retry_delay": timedelta(0)}


@task(**RETRYING)
def digest(outputs: dict) -> str:
    """Print what reached the next task."""
    return hashlib.sha256(json.dumps(outputs, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


@dag(DAG_ID, schedule=None)
def waits_while_processes_die():
    """Wait."""
    tasks = {}
    for wait in waits(SENSORS):
        tasks[wait.task_id] = DifyWorkflowRunSensor(
            task_id=wait.task_id, workflow_run_id=workflow_run_id(wait.task_id), **wait.arguments, **RETRYING
        )
    for wait in waits(OPERATORS):
        tasks[wait.task_id] = DifyRunWorkflowOperator(
            task_id=wait.task_id, inputs={"task_id": wait.task_id}, **wait.arguments, **RETRYING
        )
    # The outputs of a megabyte, as the next task gets them.
    for way in {**SENSORS, **OPERATORS}:
        digest.override(task_id=f"digest-{way}")(tasks[f"{way}-0"].output)


waits_while_processes_die()
