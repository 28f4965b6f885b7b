"""A worker process that is killed in the middle of a run, on real Airflow processes: the run is not paid for twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_processes import AIRFLOW_3_0, AirflowProcesses, airflow_processes
from tests.dify_stand_in import API_KEY, DifyStandIn, Start

pytestmark = pytest.mark.airflow_processes

KEY = "app-zQ9-the-key-of-this-test"
OUTPUTS = {"answer": "héllo 你好 🎉"}

DAG = """
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

@dag(schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def killed():
    for name, user in {users!r}.items():
        DifyRunWorkflowOperator(
            task_id=name, inputs={{"task": name}}, user=user, poll_interval=1, retries=1, retry_delay=timedelta(0)
        )

killed()
"""

# Without a user of one's own the run is found in Dify's log on every Airflow, with one in Airflow's task state (3.3).
USERS: dict[str, str | None] = {"of_the_try": None}
if CAN_START_FROM_TRIGGER:
    USERS["of_ones_own"] = "data-team"


@pytest.fixture(scope="module")
def killed() -> Iterator[tuple[DifyStandIn, AirflowProcesses]]:
    """Run the Dag, kill each task's process once its run is started, and let the runs succeed after that."""
    with DifyStandIn() as dify:
        dify.api_keys = {KEY}
        for _ in range(2 * len(USERS)):
            dify.starts.append(Start(statuses=("running",), cut=900, then="pings"))
        connection = {"conn_type": "dify", "host": dify.base_url, "password": KEY, "extra": {"timeout": 5}}
        environment = {
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
        }
        with airflow_processes(environment) as airflow:
            (airflow.dags / "killed.py").write_text(DAG.format(users=USERS))
            for _ in USERS:
                _kill_the_next(airflow, dify)
            airflow.wait_for(
                lambda: airflow.query("SELECT count(*) FROM dag_run WHERE state IN ('success', 'failed')") == [(1,)],
                seconds=240,
            )
            for path, content in airflow.everything_written():
                assert KEY.encode() not in content, path
            yield dify, airflow


def _kill_the_next(airflow: AirflowProcesses, dify: DifyStandIn) -> None:
    def told_of() -> list[tuple[str, int]]:
        # Killed once each, and only when the run's id is in Airflow.
        return airflow.query(
            "SELECT ti.task_id, ti.pid FROM task_instance ti JOIN xcom x ON x.task_id = ti.task_id "
            "AND x.key = 'task_id' WHERE ti.state = 'running' AND ti.try_number = 1 AND ti.pid IS NOT NULL"
        )

    airflow.wait_for(lambda: bool(told_of()), seconds=120)
    task_id, pid = told_of()[0]
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    airflow.wait_for(
        lambda: airflow.query("SELECT try_number FROM task_instance WHERE task_id = ?", task_id) == [(2,)], seconds=120
    )
    (run,) = [started for started in dify.started if started.inputs["task"] == task_id]
    dify.add_run("running", "running", "succeeded", run_id=run.workflow_run_id, outputs=OUTPUTS)


@pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task whose process was killed")
@pytest.mark.parametrize("task_id", USERS)
def test_the_retry_continues_the_run_of_the_killed_try(
    killed: tuple[DifyStandIn, AirflowProcesses], task_id: str
) -> None:
    dify, airflow = killed
    assert airflow.query("SELECT state, try_number FROM task_instance WHERE task_id = ?", task_id) == [("success", 2)]
    assert [started.inputs["task"] for started in dify.started].count(task_id) == 1
    (value,) = airflow.query("SELECT value FROM xcom WHERE task_id = ? AND key = 'return_value'", task_id)
    assert json.loads(value[0]) == OUTPUTS
    assert dify.stopped == []


@pytest.mark.skipif(
    not CAN_START_FROM_TRIGGER, reason="before Airflow 3.3 a trigger is not told that its task is ended"
)
def test_a_deferred_task_that_a_user_ends_stops_its_run() -> None:
    with DifyStandIn() as dify:
        dify.starts.append(Start(statuses=("running",)))
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
        with airflow_processes({"AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection)}) as airflow:
            (airflow.dags / "ended.py").write_text(
                DAG.format(users={"ended": None}).replace("def killed", "def ended").replace("killed()", "ended()")
                .replace("poll_interval=1", "poll_interval=1, deferrable=True")
            )  # fmt: skip
            deferred = "SELECT count(*) FROM task_instance WHERE state = 'deferred'"
            # Until the triggerer polls it, which the worker before it does not.
            airflow.wait_for(lambda: airflow.query(deferred) == [(1,)] and len(dify.requests) > 2, seconds=120)
            airflow.mark_failed("ended", "ended")
            airflow.wait_for(lambda: bool(dify.stopped), seconds=60)
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="before Airflow 3.3 a trigger is not told that it is cancelled")
def test_a_run_is_not_stopped_when_another_triggerer_takes_its_wait_over() -> None:
    with DifyStandIn() as dify:
        dify.starts.append(Start(statuses=("running",)))
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
        environment = {
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection),
            "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
            "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "4",
        }
        with airflow_processes(environment) as airflow:
            (airflow.dags / "moved.py").write_text(
                DAG.format(users={"moved": None}).replace("def killed", "def moved").replace("killed()", "moved()")
                .replace("poll_interval=1", "poll_interval=1, deferrable=True")
            )  # fmt: skip
            owner = "SELECT triggerer_id FROM trigger WHERE triggerer_id IS NOT NULL"
            airflow.wait_for(lambda: bool(airflow.query(owner)) and len(dify.requests) > 2, seconds=120)
            first = airflow.query(owner)
            # It is frozen for a while, as on a machine under load; a second one takes over meanwhile.
            frozen = airflow.processes["triggerer frozen"] = airflow.processes.pop("triggerer")
            os.kill(frozen.pid, signal.SIGSTOP)
            try:
                airflow.start("triggerer")
                airflow.wait_for(lambda: airflow.query(owner) not in ([], first), seconds=120)
            finally:
                os.kill(frozen.pid, signal.SIGCONT)
            logs = airflow.home / "logs"
            airflow.wait_for(
                lambda: any("invoking on_kill" in path.read_text() for path in logs.rglob("attempt*")), seconds=60
            )
            # It asks within two seconds, if it asks.
            time.sleep(5)
            assert dify.stopped == []
            dify.add_run("succeeded", run_id=dify.started[0].workflow_run_id, outputs=OUTPUTS)
            airflow.wait_for(
                lambda: airflow.query("SELECT state FROM dag_run") in ([("success",)], [("failed",)]), seconds=120
            )
            assert airflow.query("SELECT state, try_number FROM task_instance") == [("success", 1)]
    assert len(dify.started) == 1
