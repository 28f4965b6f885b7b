"""Worker processes that Airflow terminates in the middle of a run, a start or a batch, on real Airflow processes."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_processes import AIRFLOW_2
from tests.airflow.shared_airflow import Scenario, SharedAirflow, side_by_side
from tests.dify_stand_in import Start

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.long,
    # Airflow 2's task process has a parent that answers a signal for it, and 3.0 does not retry such a task.
    pytest.mark.skipif(AIRFLOW_2 or not CAN_START_FROM_TRIGGER, reason="a retry remembers a stop from Airflow 3.3 on"),
]

DAG = """
import pendulum
from datetime import timedelta
from airflow.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def terminated():
    {operator}(
        task_id="run", dify_conn_id={conn_id!r}, poll_interval=1, retries=1, retry_delay=timedelta(seconds=1),
        {arguments}
    )

terminated()
"""


def posts(scenario: Scenario) -> list[str]:
    """Return what Dify was asked to do, in order: to run or to stop."""
    return [request.path.rpartition("/")[2] for request in list(scenario.dify.requests) if request.method == "POST"]


def add_dag(scenario: Scenario) -> None:
    scenario.add_dag(DAG, operator="DifyRunWorkflowOperator", arguments="inputs={}")


def succeeds_at_the_second_try(scenario: Scenario) -> None:
    scenario.wait_until_over(seconds=180)
    assert scenario.query("state, try_number", "task_instance") == [("success", 2)]


def the_run_is_stopped_and_another_one_started(scenario: Scenario) -> None:
    # The record of the first run stays `running` for ever on 1.14.2: nobody may wait for it.
    dify = scenario.dify
    dify.starts.extend([Start(duration=300), Start(duration=1)])
    add_dag(scenario)
    scenario.wait_for(lambda: scenario.query("1", "xcom", "key = 'task_id'"), seconds=180)
    first = dify.started[0]
    scenario.kill(signal.SIGTERM)
    succeeds_at_the_second_try(scenario)
    # Before the retry, so by the process that was terminated.
    assert posts(scenario) == ["run", "stop", "run"]
    assert dify.stopped == [(first.task_id, first.user)]


def the_queued_run_is_found_again(scenario: Scenario) -> None:
    dify = scenario.dify
    dify.slots = 0
    add_dag(scenario)
    scenario.wait_for(lambda: dify.started, seconds=180)
    # So that Airflow has been asked to remember that Dify took the start.
    time.sleep(2)
    scenario.kill(signal.SIGTERM)
    scenario.wait_for(lambda: scenario.query("1", "task_instance", "try_number = 2"), seconds=120)
    dify.slots = 4
    succeeds_at_the_second_try(scenario)
    assert len(dify.started) == 1


def the_run_of_a_slow_start_is_stopped(scenario: Scenario) -> None:
    dify = scenario.dify
    dify.starts.extend([Start(duration=300), Start(duration=1)])

    async def start_and_respond_late(request: Any) -> Any:
        # Dify is slow to begin its response; the run continues from here, whatever becomes of its client.
        await asyncio.sleep(1.5)
        return await dify.respond_to(request)

    dify.misbehave(start_and_respond_late, only="POST .*/run")
    add_dag(scenario)
    scenario.wait_for(lambda: any(request.method == "POST" for request in list(dify.requests)), seconds=180)
    scenario.kill(signal.SIGTERM)
    succeeds_at_the_second_try(scenario)
    assert posts(scenario) == ["run", "stop", "run"]
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


def the_batchs_runs_are_stopped_and_their_rows_run_again(scenario: Scenario, folder: Path) -> None:
    dify = scenario.dify
    output = folder / f"{scenario.dag_id}.jsonl"
    # Two rows are over before.
    dify.starts.extend([Start(), Start(), *(Start(duration=300) for _ in range(4))])
    arguments = f"""inputs=[{{"n": n}} for n in range(10)], output_path={str(output)!r}, max_active_runs=4,
        not_found_grace=2,"""
    scenario.add_dag(DAG, operator="DifyRunWorkflowBatchOperator", arguments=arguments)
    scenario.wait_for(lambda: len(dify.started) == 6, seconds=180)
    time.sleep(1)
    scenario.kill(signal.SIGTERM)
    succeeds_at_the_second_try(scenario)
    assert posts(scenario) == ["run"] * 6 + ["stop"] * 4 + ["run"] * 8
    assert sorted(task_id for task_id, _ in dify.stopped) == sorted(run.task_id for run in dify.started[2:6])
    rows = [run.inputs["n"] for run in dify.started]
    stopped = {run.inputs["n"] for run in dify.started[2:6]}
    assert {n: rows.count(n) for n in range(10)} == {n: 2 if n in stopped else 1 for n in range(10)}
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["index"], row["status"]) for row in results] == [(n, "succeeded") for n in range(10)]


@pytest.fixture(scope="module")
def outcomes(shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[None]]:
    """How each scenario ended; all of them ran at the same time."""
    batch = functools.partial(
        the_batchs_runs_are_stopped_and_their_rows_run_again, folder=tmp_path_factory.mktemp("results")
    )
    scenarios: dict[str, Callable[[Scenario], None]] = {
        "stopped-1.14.2": the_run_is_stopped_and_another_one_started,
        "stopped-1.16.1": the_run_is_stopped_and_another_one_started,
        "queued-1.14.2": the_queued_run_is_found_again,
        "queued-1.16.1": the_queued_run_is_found_again,
        "starting-1.16.1": the_run_of_a_slow_start_is_stopped,
        "batch-1.14.2": batch,
        "batch-1.16.1": batch,
    }

    def run(name: str) -> None:
        with shared.scenario(f"terminated_{name}", dialect=name.partition("-")[2]) as scenario:
            scenarios[name](scenario)

    return side_by_side({name: functools.partial(run, name) for name in scenarios})


@pytest.mark.parametrize("version", ["1.14.2", "1.16.1"])
def test_a_terminated_task_stops_its_run_and_the_retry_starts_a_new_one(
    outcomes: dict[str, Future[None]], version: str
) -> None:
    outcomes[f"stopped-{version}"].result()


@pytest.mark.parametrize("version", ["1.14.2", "1.16.1"])
def test_a_task_that_is_terminated_while_its_run_is_queued_finds_it_again(
    outcomes: dict[str, Future[None]], version: str
) -> None:
    outcomes[f"queued-{version}"].result()


def test_a_task_that_is_terminated_while_its_start_is_under_way_stops_the_run(
    outcomes: dict[str, Future[None]],
) -> None:
    outcomes["starting-1.16.1"].result()


# The record of a run that was stopped stays `running` for ever on 1.14.2: nobody may wait for it.
@pytest.mark.parametrize("version", ["1.14.2", "1.16.1"])
def test_a_terminated_batch_stops_its_runs_and_the_retry_runs_the_rows_again(
    outcomes: dict[str, Future[None]], version: str
) -> None:
    outcomes[f"batch-{version}"].result()
