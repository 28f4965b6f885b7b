"""A Dify whose workers are all busy, and more starts than it can run, on real Airflow processes."""

from __future__ import annotations

import json
import threading
from datetime import datetime
from pathlib import Path

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.shared_airflow import Scenario, SharedAirflow

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.long,
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

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def queued():
    for name, deferrable in (("worker", False), ("deferrable", True)):
        DifyRunWorkflowOperator.partial(
            task_id=name, dify_conn_id={conn_id!r}, deferrable=deferrable, poll_interval=1, timeout=300,
            retries=2, retry_delay=timedelta(seconds=1),
        ).expand(inputs=[{{"item": item, "way": name}} for item in range({starts})])

queued()
"""


@pytest.fixture(scope="module")
def queued(shared: SharedAirflow) -> Scenario:
    with shared.scenario("queued", dialect="1.16.1") as scenario:
        dify = scenario.dify
        dify.slots = 0
        dify.run_duration = 1.0
        scenario.add_dag(DAG, starts=STARTS)
        scenario.wait_for(lambda: dify.started, seconds=120)
        threading.Timer(BUSY, lambda: setattr(dify, "slots", SLOTS)).start()
        scenario.wait_until_over(seconds=400)
        return scenario


def test_every_start_succeeds(queued: Scenario) -> None:
    # Not always at its first try: on a loaded machine Airflow may take a task for dead.
    rows = queued.query("task_id, state", "task_instance")
    assert sorted(rows) == sorted((way, "success") for way in ("worker", "deferrable") for _ in range(STARTS))


def test_dify_ran_each_of_them_once(queued: Scenario) -> None:
    started = sorted((run.inputs["way"], run.inputs["item"]) for run in queued.dify.started)
    assert started == sorted((way, item) for way in ("worker", "deferrable") for item in range(STARTS))
    assert queued.dify.stopped == []


def test_a_queued_run_holds_no_worker_if_the_task_is_deferrable(queued: Scenario) -> None:
    seconds = [worker_seconds(path) for path in log_files(queued, "deferrable")]
    assert len(seconds) == STARTS
    print(f"seconds of a worker for each of {STARTS} deferrable starts: {sorted(round(each, 1) for each in seconds)}")
    # On an idle machine 12 at most; a loaded one starts Python slowly, and runs some tries twice.
    assert max(seconds) < 0.75 * BUSY


def log_files(queued: Scenario, task_id: str) -> list[Path]:
    """Return the workers' logs of a task's instances; the triggerer writes its own beside them."""
    logs = queued.airflow.home / "logs" / f"dag_id={queued.dag_id}"
    return [path for path in logs.rglob("attempt=1.log") if f"task_id={task_id}" in str(path)]


def worker_seconds(log: Path) -> float:
    """Return how long workers were busy with a try: up to its deferral, and from its resumption on."""
    parts: list[list[datetime]] = []
    for line in log.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        if "Pre Execute" in str(fields.get("event")):
            parts.append([])
        parts[-1].append(datetime.fromisoformat(fields["timestamp"].replace("Z", "+00:00")))
    return sum((part[-1] - part[0]).total_seconds() for part in parts)
