"""A worker process that Airflow terminates in the middle of a run or of a start, on real Airflow processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses, airflow_processes
from tests.dify_stand_in import API_KEY, DifyStandIn, Start

pytestmark = [
    pytest.mark.airflow_processes,
    # Airflow 2's task process has a parent that answers a signal for it, and 3.0 does not retry such a task.
    pytest.mark.skipif(AIRFLOW_2 or not CAN_START_FROM_TRIGGER, reason="a retry remembers a stop from Airflow 3.3 on"),
]

DAG = """
import pendulum
from datetime import timedelta
from airflow.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

@dag(schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def terminated():
    DifyRunWorkflowOperator(task_id="run", inputs={}, poll_interval=1, retries=1, retry_delay=timedelta(seconds=1))

terminated()
"""
FIRST_TRY = "SELECT pid FROM task_instance WHERE state = 'running' AND try_number = 1 AND pid IS NOT NULL"
ENDED = "SELECT count(*) FROM dag_run WHERE state IN ('success', 'failed')"


@pytest.fixture(params=["1.14.2", "1.16.1"])
def dify(request: pytest.FixtureRequest) -> Iterator[DifyStandIn]:
    with DifyStandIn(request.param) as stand_in:
        yield stand_in


@pytest.fixture
def airflow(dify: DifyStandIn) -> Iterator[AirflowProcesses]:
    connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
    with airflow_processes({"AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection)}) as processes:
        yield processes


def terminate(airflow: AirflowProcesses) -> float:
    """Send SIGTERM to the first try's process, and return when."""
    airflow.wait_for(lambda: bool(airflow.query(FIRST_TRY)), seconds=60)
    os.kill(airflow.query(FIRST_TRY)[0][0], signal.SIGTERM)
    return time.monotonic()


def test_a_terminated_task_stops_its_run_and_the_retry_starts_a_new_one(
    dify: DifyStandIn, airflow: AirflowProcesses
) -> None:
    # The record of the first run stays `running` for ever on 1.14.2: nobody may wait for it.
    dify.starts.extend([Start(duration=300), Start(duration=1)])
    (airflow.dags / "terminated.py").write_text(DAG)
    airflow.wait_for(lambda: airflow.query("SELECT count(*) FROM xcom WHERE key = 'task_id'") == [(1,)], seconds=120)
    first = dify.started[0]
    sent = terminate(airflow)
    airflow.wait_for(lambda: bool(dify.stopped), seconds=10)
    assert time.monotonic() - sent < 5
    assert dify.stopped == [(first.task_id, first.user)]
    airflow.wait_for(lambda: airflow.query(ENDED) == [(1,)], seconds=120)
    assert airflow.query("SELECT state, try_number FROM task_instance") == [("success", 2)]
    assert len(dify.started) == 2
    assert dify.stopped == [(first.task_id, first.user)]


def test_a_task_that_is_terminated_while_its_run_is_queued_finds_it_again(
    dify: DifyStandIn, airflow: AirflowProcesses
) -> None:
    dify.slots = 0
    (airflow.dags / "terminated.py").write_text(DAG)
    airflow.wait_for(lambda: bool(dify.started), seconds=120)
    # So that Airflow has been asked to remember that Dify took the start.
    time.sleep(2)
    terminate(airflow)
    airflow.wait_for(lambda: airflow.query("SELECT try_number FROM task_instance") == [(2,)], seconds=120)
    dify.slots = 4
    airflow.wait_for(lambda: airflow.query(ENDED) == [(1,)], seconds=120)
    assert airflow.query("SELECT state, try_number FROM task_instance") == [("success", 2)]
    assert len(dify.started) == 1


@pytest.mark.parametrize("dify", ["1.16.1"], indirect=True)
def test_a_task_that_is_terminated_while_its_start_is_under_way_stops_the_run(
    dify: DifyStandIn, airflow: AirflowProcesses
) -> None:
    dify.starts.extend([Start(duration=300), Start(duration=1)])

    async def start_and_respond_late(request: Any) -> Any:
        # Dify is slow to begin its response; the run goes on from here, whatever becomes of its client.
        await asyncio.sleep(1.5)
        return await dify.respond_to(request)

    dify.misbehave(start_and_respond_late, only="POST .*/run")
    (airflow.dags / "terminated.py").write_text(DAG)
    airflow.wait_for(lambda: any(request.method == "POST" for request in dify.requests), seconds=120)
    terminate(airflow)
    airflow.wait_for(lambda: bool(dify.stopped), seconds=15)
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]
    airflow.wait_for(lambda: airflow.query(ENDED) == [(1,)], seconds=120)
    assert airflow.query("SELECT state, try_number FROM task_instance") == [("success", 2)]
    assert len(dify.started) == 2
