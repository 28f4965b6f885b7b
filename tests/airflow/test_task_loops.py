"""Iterations of a task loop (Airflow 3.4), and tasks that are cleared with their state kept, have runs of their own."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import pytest

from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.tasks.start import StartMemory, TaskStart, default_user, new_start
from tests.airflow.airflow_processes import AIRFLOW_3_4
from tests.airflow.airflow_runs import run_dag
from tests.dify_stand_in import DifyStandIn, Start, respond

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")
on_airflow_3_4 = pytest.mark.skipif(not AIRFLOW_3_4, reason="Airflow 3.4 brings task loops")

# Both have the same beginning, as the ids of regions that Airflow makes within a minute.
REGION, OTHER_REGION = UUID("019ad7a0-0000-7000-8000-000000000001"), UUID("019ad7a0-0000-7000-8000-000000000002")


def ti_of(region_id: UUID | None = REGION, region_index: int | None = 0, map_index: int = -1) -> Any:
    return SimpleNamespace(
        dag_id="d",
        task_id="t",
        run_id="r",
        map_index=map_index,
        try_number=1,
        max_tries=1,
        region_id=region_id,
        region_index=region_index,
    )


@pytest.mark.parametrize("other", [ti_of(region_index=1), ti_of(OTHER_REGION), ti_of(UUID(int=0), -1)])
@pytest.mark.parametrize("user", [None, "somebody"])
def test_task_instances_that_differ_in_the_region_only_share_no_name(other: Any, user: str | None) -> None:
    assert default_user(ti_of(), 1) != default_user(other, 1)
    assert RowUsers.of_task(ti_of(), user) != RowUsers.of_task(other, user)
    assert BatchName.of_task(ti_of()) != BatchName.of_task(other)


@pytest.mark.parametrize("map_index", [-1, 3])
@pytest.mark.parametrize("has_region", [True, False])
def test_a_task_in_no_region_is_named_as_on_older_airflows(map_index: int, has_region: bool) -> None:
    older = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=map_index, try_number=1, max_tries=1)
    # Airflow 3.4 says so with a region of zeros.
    newer = ti_of(UUID(int=0) if has_region else None, map_index if has_region else None, map_index)
    assert default_user(newer, 1) == default_user(older, 1)
    assert RowUsers.of_task(newer) == RowUsers.of_task(older)
    assert BatchName.of_task(newer) == BatchName.of_task(older)


def test_mapped_tasks_that_write_to_one_file_are_noticed_in_a_region_too() -> None:
    one, other = (BatchName.of_task(ti_of(region_index=index, map_index=index)) for index in (0, 1))
    assert one.is_beside(other)


LOOP = """
from airflow.sdk import task_group
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

@task_group
def body():
    @task
    def seed(*, loop):
        return loop.index

    {operator}
    seed() >> run

body.loop(max_iterations=3)
"""


@on_airflow_3_4
@pytest.mark.long
def test_a_retry_in_a_loops_second_iteration_continues_its_own_rows(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "{{ loop.index }}.jsonl"
    # In the second iteration Dify is away when the second row's run is asked for.
    broken = Start(statuses=("running", "succeeded"), cut="workflow_started")
    dify.starts += [Start()] * 4 + [broken] + [Start()] * 4
    dify.misbehave(*[respond(503)] * 2, only="GET .*/(workflows/run/|info)")
    result = run_dag(
        LOOP.format(
            operator=f"""run = DifyRunWorkflowBatchOperator(
        task_id="run", inputs=[{{"n": n, "iteration": "{{{{ loop.index }}}}"}} for n in range(3)],
        output_path={str(output)!r}, max_active_runs=1, poll_interval=0.2, retries=1, retry_delay=0.0,
        max_consecutive_failures=0, not_found_grace=0.2,
    )"""
        )
    )
    assert result.state == "success"
    for iteration in range(3):
        rows = [json.loads(line) for line in (tmp_path / f"{iteration}.jsonl").read_text().splitlines()]
        started = {run.workflow_run_id for run in dify.started if str(run.inputs["iteration"]) == str(iteration)}
        assert [row["index"] for row in rows] == [0, 1, 2]
        assert {row["workflow_run_id"] for row in rows} <= started
    assert len({run.user.rpartition("/")[0] for run in dify.started}) == 3
    assert (result.tries["body.run[1]"], len(dify.started)) == (2, 9)


@on_airflow_3_4
@pytest.mark.long
@pytest.mark.parametrize("deferrable", [False, True])
def test_a_retry_in_a_loops_second_iteration_starts_a_run_of_its_own(dify: DifyStandIn, deferrable: bool) -> None:
    outputs = [{"start": number} for number in range(4)]
    dify.starts += [Start(fields={"outputs": outputs[0]}), Start("run_streaming_failed")]
    dify.starts += [Start(fields={"outputs": each}) for each in outputs[2:]]
    result = run_dag(
        LOOP.format(
            operator=f"""run = DifyRunWorkflowOperator(
        task_id="run", inputs={{}}, poll_interval=0.05, defer_after=0, deferrable={deferrable}, retries=1,
        retry_delay=0.0,
    )"""
        )
    )
    assert result.state == "success"
    users = [run.user for run in dify.started]
    assert len(set(users)) == 4
    assert [user.rpartition("/")[2] for user in users] == ["1", "1", "2", "1"]
    assert [user.partition("[")[2][0] for user in users] == ["0", "1", "1", "2"]


# --- tasks that are cleared with their state kept


def remembered_and_cleared(monkeypatch: pytest.MonkeyPatch, discards: bool, **fields: Any) -> TaskStart | None:
    """Keep a start, clear its task but not its state, and return what the next try gets of it."""
    monkeypatch.setattr("airflow_provider_dify.tasks.start.CLEARING_DISCARDS_STATE", discards)
    ti = ti_of()
    store: dict[str, Any] = {}
    context = {"ti": ti, "task_state_store": SimpleNamespace(get=store.get, set=store.__setitem__)}
    StartMemory(context).save(replace(new_start(ti, None, {}, (), 0.0), **fields))
    ti.max_tries += 1
    return StartMemory(context).load()


def test_state_that_outlives_a_clear_is_continued_where_a_clear_discards_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = remembered_and_cleared(monkeypatch, True, workflow_run_id="r")
    assert start is not None
    assert (start.workflow_run_id, start.max_tries) == ("r", 2)
    assert remembered_and_cleared(monkeypatch, True, was_returned=True) is None
    assert remembered_and_cleared(monkeypatch, False, workflow_run_id="r") is None


CLEARED = """
run = DifyRunWorkflowOperator(task_id="run", inputs={{}}, poll_interval=0.05, defer_after=0, {arguments})

@task(trigger_rule="all_done")
def clear_once(ti=None):
    clear_task(dag, ti, "run")

run >> clear_once()
"""


@on_airflow_3_4
def test_a_task_that_failed_and_is_cleared_with_its_state_kept_gets_the_run_of_before(dify: DifyStandIn) -> None:
    dify.run_duration = 4.0
    # This clear of dag.test() keeps the state, as a user's does who asks for it.
    result = run_dag(CLEARED.format(arguments="timeout=1, stop_on_failure=False, on_failure_callback=raised"))
    assert result.state == "success"
    assert len(result.raised["run"]) >= 1
    (started,) = dify.started
    assert result.xcoms["run"]["workflow_run_id"] == started.workflow_run_id


@pytest.mark.parametrize("arguments", ["", "deferrable=True", "deferrable=True, end_from_trigger=True", "waits=False"])
@on_airflow_3_4
def test_a_task_that_succeeded_and_is_cleared_starts_another_run_whatever_is_kept(
    dify: DifyStandIn, arguments: str
) -> None:
    result = run_dag(CLEARED.format(arguments=arguments.replace("waits", "wait_for_completion")))
    assert result.state == "success"
    assert len(dify.started) == 2
