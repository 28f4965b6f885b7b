"""A Dify whose workers are all busy, and more starts than it can run, on real Airflow processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_processes import AirflowProcesses, airflow_processes
from tests.dify_stand_in import API_KEY, DifyStandIn

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="one Airflow is enough, and 3.3 logs in JSON"),
]

STARTS = 12
SLOTS = 4
# For so long all of Dify's workers are busy, and a task that waits on a worker is.
BUSY = 40.0

DAG = """
import pendulum
from datetime import timedelta
from airflow.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

@dag(schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def queued():
    for name, deferrable in (("worker", False), ("deferrable", True)):
        DifyRunWorkflowOperator.partial(
            task_id=name, deferrable=deferrable, poll_interval=1, timeout=300,
            retries=2, retry_delay=timedelta(seconds=1),
        ).expand(inputs=[{"item": item, "way": name} for item in range(%d)])

queued()
"""


@pytest.fixture(scope="module")
def queued() -> Iterator[tuple[DifyStandIn, AirflowProcesses]]:
    with DifyStandIn("1.16.1") as dify:
        dify.slots = 0
        dify.run_duration = 1.0
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
        environment = {"AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection), "AIRFLOW__LOGGING__JSON_LOGS": "True"}
        with airflow_processes(environment) as airflow:
            (airflow.dags / "queued.py").write_text(DAG % STARTS)
            airflow.wait_for(lambda: len(dify.started) > 0, seconds=120)
            threading.Timer(BUSY, lambda: setattr(dify, "slots", SLOTS)).start()
            airflow.wait_for(
                lambda: airflow.query("SELECT count(*) FROM dag_run WHERE state IN ('success', 'failed')") == [(1,)],
                seconds=400,
            )
            yield dify, airflow


def test_every_start_succeeds(queued: tuple[DifyStandIn, AirflowProcesses]) -> None:
    # Not at its first try always: a task that resumes before the scheduler has heard of its deferral is taken for dead.
    _, airflow = queued
    rows = airflow.query("SELECT task_id, state FROM task_instance")
    assert sorted(rows) == sorted((way, "success") for way in ("worker", "deferrable") for _ in range(STARTS))


def test_dify_ran_each_of_them_once(queued: tuple[DifyStandIn, AirflowProcesses]) -> None:
    dify, _ = queued
    started = sorted((run.inputs["way"], run.inputs["item"]) for run in dify.started)
    assert started == sorted((way, item) for way in ("worker", "deferrable") for item in range(STARTS))
    assert dify.stopped == []


def test_a_queued_run_holds_no_worker_if_the_task_is_deferrable(queued: tuple[DifyStandIn, AirflowProcesses]) -> None:
    _, airflow = queued
    seconds = [worker_seconds(path) for path in log_files(airflow, "deferrable")]
    assert len(seconds) == STARTS
    print(f"seconds of a worker for each of {STARTS} deferrable starts: {sorted(round(each, 1) for each in seconds)}")
    # On an idle machine 12 at most; a loaded one starts Python slowly, and runs some tries twice.
    assert max(seconds) < 0.75 * BUSY


def log_files(airflow: AirflowProcesses, task_id: str) -> list[Path]:
    """Return the workers' logs of a task's instances; the triggerer writes its own beside them."""
    return [path for path in (airflow.home / "logs").rglob("attempt=1.log") if f"task_id={task_id}" in str(path)]


def worker_seconds(log: Path) -> float:
    """Return how long workers were busy with a try: up to its deferral, and from its resumption on."""
    parts: list[list[datetime]] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if "Pre Execute" in str(fields.get("event")):
            parts.append([])
        parts[-1].append(datetime.fromisoformat(fields["timestamp"].replace("Z", "+00:00")))
    return sum((part[-1] - part[0]).total_seconds() for part in parts)
