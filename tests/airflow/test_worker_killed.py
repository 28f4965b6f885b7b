"""Processes that are killed or frozen in the middle of a run, on real Airflow processes: it is not paid for twice."""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER, KILLS_WHAT_IT_HANDS_OVER
from tests.airflow.airflow_processes import AIRFLOW_3_0, airflow_processes
from tests.airflow.shared_airflow import KEY, SETTINGS, Scenario, SharedAirflow, chosen_params, side_by_side
from tests.combinations import each_or_long
from tests.dify_stand_in import DifyStandIn, Start, stall

pytestmark = pytest.mark.airflow_processes

OUTPUTS = {"answer": "héllo 你好 🎉"}

DAG = """
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def killed():
    DifyRunWorkflowOperator(
        task_id="run", dify_conn_id={conn_id!r}, inputs={{}}, user={user!r}, deferrable={deferrable}, poll_interval=1,
        defer_after=0, retries=1, retry_delay=timedelta(0),
    )

killed()
"""

# Without a user of one's own the run is found in Dify's log on every Airflow, with one in Airflow's task state (3.3).
USERS: dict[str, str | None] = {"of_the_try": None}
if CAN_START_FROM_TRIGGER:
    USERS["of_ones_own"] = "data-team"


def kill_the_first_try(user: str | None, scenario: Scenario) -> None:
    """Kill the task's process once its run is started, and let the run succeed after that."""
    dify = scenario.dify
    for _ in range(2):
        dify.starts.append(Start(statuses=("running",), cut=900, then="pings"))
    scenario.add_dag(DAG, user=user, deferrable=False)
    # Only when the run's id is in Airflow.
    scenario.wait_for(lambda: scenario.query("1", "xcom", "key = 'task_id'"), seconds=180)
    scenario.kill(signal.SIGKILL)
    scenario.wait_for(lambda: scenario.query("1", "task_instance", "try_number = 2"), seconds=120)
    dify.add_run("running", "running", "succeeded", run_id=dify.started[0].workflow_run_id, outputs=OUTPUTS)
    scenario.wait_until_over(seconds=240)


def fail_the_deferred_task(scenario: Scenario) -> None:
    """Mark the task as failed while it is deferred, as a user does in the UI."""
    dify = scenario.dify
    dify.starts.append(Start(statuses=("running",)))
    # Airflow cancels a killed trigger again each second until it has ended.
    dify.misbehave(stall(1.2), only="/stop")
    scenario.add_dag(DAG, user=None, deferrable=True)
    # Until the triggerer polls it, which the worker before it does not.
    scenario.wait_for(
        lambda: scenario.query("1", "task_instance", "state = 'deferred'") and len(dify.requests) > 2, seconds=180
    )
    scenario.airflow.mark_failed(scenario.dag_id, "run")
    scenario.wait_for(lambda: dify.stopped, seconds=60)


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, shared: SharedAirflow) -> dict[str, Future[Scenario]]:
    """How each scenario ended; all of them ran at the same time."""
    scenarios: dict[str, Callable[[Scenario], None]] = {
        name: functools.partial(kill_the_first_try, user) for name, user in USERS.items()
    }
    if CAN_START_FROM_TRIGGER:
        scenarios["failed_by_a_user"] = fail_the_deferred_task
    chosen = chosen_params(request, "name")

    def run(name: str) -> Scenario:
        with shared.scenario(f"killed_{name}") as scenario:
            scenarios[name](scenario)
            return scenario

    return side_by_side({name: functools.partial(run, name) for name in scenarios if name in chosen})


@pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task whose process was killed")
@pytest.mark.parametrize("name", each_or_long(USERS, short=["of_the_try"]))
def test_the_retry_continues_the_run_of_the_killed_try(outcomes: dict[str, Future[Scenario]], name: str) -> None:
    scenario = outcomes[name].result()
    assert scenario.query("state, try_number", "task_instance") == [("success", 2)]
    assert len(scenario.dify.started) == 1
    ((value,),) = scenario.query("value", "xcom", "key = 'return_value'")
    assert json.loads(value) == OUTPUTS
    assert scenario.dify.stopped == []
    for path, content in scenario.airflow.everything_written():
        assert KEY.encode() not in content, path


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="before Airflow 3.3 a trigger cannot see that its task is ended")
@pytest.mark.parametrize("name", ["failed_by_a_user"])
def test_a_deferred_task_that_a_user_ends_stops_its_run_although_dify_is_slow(
    outcomes: dict[str, Future[Scenario]], name: str
) -> None:
    dify = outcomes[name].result().dify
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="before Airflow 3.3 a trigger cannot see that it is cancelled")
@pytest.mark.long
def test_a_run_is_not_stopped_when_another_triggerer_takes_its_wait_over() -> None:
    # Other Dags need the shared Airflow's triggerer.
    with DifyStandIn() as dify:
        dify.api_keys = {KEY}
        fields = json.dumps({"conn_type": "dify", "host": dify.base_url, "password": KEY})
        with airflow_processes({**SETTINGS, "AIRFLOW_CONN_DIFY_DEFAULT": fields}) as airflow:
            take_the_wait_over(Scenario(airflow, dify, "moved", "dify_default"))


def take_the_wait_over(scenario: Scenario) -> None:
    """Freeze the triggerer for a while, as on a machine under load; a second one takes over meanwhile."""
    airflow, dify = scenario.airflow, scenario.dify
    dify.starts.append(Start(statuses=("running",)))
    scenario.add_dag(DAG, user=None, deferrable=True)
    owner = "SELECT triggerer_id FROM trigger WHERE triggerer_id IS NOT NULL"
    airflow.wait_for(lambda: bool(airflow.query(owner)) and len(dify.requests) > 2, seconds=180)
    first = airflow.query(owner)
    frozen = airflow.processes["triggerer frozen"] = airflow.processes.pop("triggerer")
    os.kill(frozen.pid, signal.SIGSTOP)
    try:
        airflow.start("triggerer")
        airflow.wait_for(lambda: airflow.query(owner) not in ([], first), seconds=120)
    finally:
        os.kill(frozen.pid, signal.SIGCONT)
    if KILLS_WHAT_IT_HANDS_OVER:
        airflow.wait_for(
            lambda: any("invoking on_kill" in path.read_text() for path in scenario.logs.rglob("attempt*")), seconds=60
        )
    # It asks within two seconds, if it asks.
    time.sleep(5)
    assert dify.stopped == []
    dify.add_run("succeeded", run_id=dify.started[0].workflow_run_id, outputs=OUTPUTS)
    scenario.wait_until_over(seconds=120)
    airflow.stop("triggerer frozen", signal.SIGKILL)
    assert scenario.query("state, try_number", "task_instance") == [("success", 1)]
    assert len(dify.started) == 1
