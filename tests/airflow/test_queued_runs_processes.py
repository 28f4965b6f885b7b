"""A Dify whose workers are all busy, and more starts than it can run, on real Airflow processes."""

from __future__ import annotations

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
            retries=2, retry_delay=timedelta(seconds=1), max_active_tis_per_dag=3 if name == "worker" else None,
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
        # A queued run holds no worker if its task is deferrable: all of them got one, and left it, while none ran.
        deferred = "task_id = 'deferrable' AND state = 'deferred'"
        scenario.wait_for(lambda: len(scenario.query("1", "task_instance", deferred)) == STARTS, seconds=400)
        assert dify.log == []
        dify.slots = SLOTS
        scenario.wait_until_over(seconds=400)
        return scenario


def test_every_start_succeeds_and_no_deferrable_task_held_a_worker_while_dify_was_busy(queued: Scenario) -> None:
    # Not always at its first try: on a loaded machine Airflow may take a task for dead.
    rows = queued.query("task_id, state", "task_instance")
    assert sorted(rows) == sorted((way, "success") for way in ("worker", "deferrable") for _ in range(STARTS))


def test_dify_ran_each_of_them_once(queued: Scenario) -> None:
    started = sorted((run.inputs["way"], run.inputs["item"]) for run in queued.dify.started)
    assert started == sorted((way, item) for way in ("worker", "deferrable") for item in range(STARTS))
    assert queued.dify.stopped == []
