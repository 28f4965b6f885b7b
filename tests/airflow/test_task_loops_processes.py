"""A task loop on real Airflow processes: an iteration's retry continues what is its own, and no other's."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_3_4
from tests.airflow.shared_airflow import Scenario, SharedAirflow

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.long,
    pytest.mark.skipif(not AIRFLOW_3_4, reason="Airflow 3.4 brings task loops"),
]

ITERATIONS, ROWS = range(3), range(2)
WAYS = ("worker", "deferrable", "triggerer")

DAG = """
import json
import os
import pendulum
import threading
from datetime import timedelta
from pathlib import Path
from airflow.sdk import dag, task, task_group
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

FOLDER = Path({folder!r})
INPUTS = {{"iteration": "{{{{ loop.index }}}}"}}
WAYS = {{"worker": {{}}, "deferrable": {{"deferrable": True}}, "triggerer": {{"end_from_trigger": True}}}}

def die_soon(context):
    # In the second iteration, in the middle of a run.
    if context["loop"].index == 1 and context["ti"].try_number == 1:
        threading.Timer(3, os._exit, [1]).start()

ARGUMENTS = {{
    "dify_conn_id": {conn_id!r}, "poll_interval": 1, "not_found_grace": 1, "retries": 1,
    "retry_delay": timedelta(0), "pre_execute": die_soon,
}}

@task
def seed(*, loop):
    return loop.index

@task
def note(way, found, *, loop):
    (FOLDER / f"{{way}}-{{loop.index}}").write_text(found)

@task
def last():
    pass

@task_group
def body():
    # A loop's body has one first task and one last.
    first, end = seed(), last()
    for way, arguments in WAYS.items():
        run = DifyRunWorkflowOperator(
            task_id=way, inputs={{**INPUTS, "way": way}}, defer_after=0, **arguments, **ARGUMENTS
        )
        first >> run
        note.override(task_id=f"note_{{way}}")(way, run.output["workflow_run_id"]) >> end
    first >> DifyRunWorkflowBatchOperator(
        task_id="batch", inputs=[{{**INPUTS, "way": "batch", "row": row}} for row in range({rows})],
        output_path=str(FOLDER / "{{{{ loop.index }}}}.jsonl"), max_active_runs=1, **ARGUMENTS
    ) >> end

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def loops():
    body.loop(max_iterations={iterations})

loops()
"""


@pytest.fixture(scope="module")
def looped(shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory) -> tuple[Scenario, Path]:
    folder = tmp_path_factory.mktemp("loops")
    with shared.scenario("loops", dialect="1.16.1") as scenario:
        scenario.dify.run_duration = 5.0
        scenario.add_dag(DAG, folder=str(folder), iterations=len(ITERATIONS), rows=len(ROWS))
        scenario.wait_until_over(seconds=500)
        return scenario, folder


def inputs_of(scenario: Scenario, run_id: str) -> dict[str, Any]:
    (inputs,) = (run.inputs for run in scenario.dify.started if run.workflow_run_id == run_id)
    return {**inputs, "iteration": int(inputs["iteration"])}


def test_each_iterations_tasks_succeed_and_those_that_were_killed_did_at_their_second_try(
    looped: tuple[Scenario, Path],
) -> None:
    rows = looped[0].query("task_id, state, try_number", "task_instance", "task_id IN ('body.worker', 'body.batch')")
    assert Counter((task, state, tries) for task, state, tries in rows) == {
        (task, "success", tries): count for task in ("body.worker", "body.batch") for tries, count in ((1, 2), (2, 1))
    }


def test_each_iteration_has_one_run_in_each_way_and_for_each_row(looped: tuple[Scenario, Path]) -> None:
    started = Counter(
        (run.inputs["way"], int(run.inputs["iteration"]), run.inputs.get("row")) for run in looped[0].dify.started
    )
    wanted = [(way, iteration, None) for way in WAYS for iteration in ITERATIONS]
    wanted += [("batch", iteration, row) for iteration in ITERATIONS for row in ROWS]
    assert started == dict.fromkeys(wanted, 1)
    assert len({run.user for run in looped[0].dify.started}) == len(wanted)
    assert looped[0].dify.stopped == []


@pytest.mark.parametrize("way", WAYS)
def test_the_next_task_of_an_iteration_gets_that_iterations_run(looped: tuple[Scenario, Path], way: str) -> None:
    scenario, folder = looped
    for iteration in ITERATIONS:
        inputs = inputs_of(scenario, (folder / f"{way}-{iteration}").read_text())
        assert inputs == {"way": way, "iteration": iteration}


def test_each_iterations_results_are_of_its_own_rows(looped: tuple[Scenario, Path]) -> None:
    scenario, folder = looped
    for iteration in ITERATIONS:
        results = [json.loads(line) for line in (folder / f"{iteration}.jsonl").read_text().splitlines()]
        inputs = [inputs_of(scenario, result["workflow_run_id"]) for result in results]
        assert inputs == [{"way": "batch", "iteration": iteration, "row": row} for row in ROWS]
