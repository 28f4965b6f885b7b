"""Put waits into Airflow's database, as a worker does that defers a task; run with the environment of an Airflow."""

from __future__ import annotations

import sys
import time
import uuid
from typing import TYPE_CHECKING

from airflow.api.common.trigger_dag import trigger_dag
from airflow.models.taskinstance import TaskInstance
from airflow.models.trigger import Trigger
from airflow.utils.session import create_session
from airflow.utils.state import TaskInstanceState
from airflow.utils.types import DagRunTriggeredByType
from sqlalchemy import select

if TYPE_CHECKING:
    from airflow.triggers.base import BaseTrigger

POLL_INTERVAL = 10.0
TASKS_OF_A_DAG_RUN = 100
DAG_ID = "deferred"
# Tasks that no worker ever starts: their Dag is paused.
DAG = f"""
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.sdk import DAG

with DAG({DAG_ID!r}, schedule=None):
    for number in range({TASKS_OF_A_DAG_RUN}):
        EmptyOperator(task_id=f"wait-{{number}}")
"""


def trigger_of(kind: str, number: int) -> BaseTrigger:
    """
    Make the trigger of a wait.

    :param kind: ``dify`` or ``dbt``, whose connection has this name, too.
    :param number: the run.
    """
    if kind == "dify":
        from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

        run_id = str(uuid.UUID(int=number))
        now = time.time()
        # As of a sensor that has polled once on a worker.
        arguments = {"poll_interval": POLL_INTERVAL, "first_poll": now, "deadline": now + 3600, "has_link": True}
        return DifyWorkflowRunTrigger(run_id, kind, **arguments)
    from airflow.providers.dbt.cloud.triggers.dbt import DbtCloudRunJobTrigger

    return DbtCloudRunJobTrigger(kind, number, time.time() + 3600, POLL_INTERVAL, account_id=1)


def defer(kind: str, count: int) -> None:
    """Defer so many tasks, and end those that were deferred before."""
    with create_session() as session:
        for ti in session.scalars(select(TaskInstance).where(TaskInstance.state == TaskInstanceState.DEFERRED)):
            ti.state, ti.trigger_id = TaskInstanceState.SUCCESS, None
    for number in range(-(-count // TASKS_OF_A_DAG_RUN)):
        trigger_dag(DAG_ID, run_id=f"{kind}-{count}-{number}", triggered_by=DagRunTriggeredByType.TEST)
    with create_session() as session:
        of_run = TaskInstance.run_id.startswith(f"{kind}-{count}-")
        for number, ti in enumerate(session.scalars(select(TaskInstance).where(of_run).limit(count))):
            classpath, kwargs = trigger_of(kind, number).serialize()
            trigger = Trigger(classpath=classpath, kwargs=kwargs)
            session.add(trigger)
            session.flush()
            ti.state, ti.trigger_id, ti.next_method = TaskInstanceState.DEFERRED, trigger.id, "execute_complete"


if __name__ == "__main__":
    defer(sys.argv[1], int(sys.argv[2]))
