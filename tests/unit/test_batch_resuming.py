"""Which runs of a batch are there already, by what Dify's log shows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pendulum
import pytest

from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.models import LoggedWorkflowRun, LogRow, RowWithoutRun, WorkflowRunStatus
from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.results import Checkpoint
from airflow_provider_dify.batch.resuming import (
    FoundRun,
    Resumption,
    RowAction,
    RowPlan,
    look_for,
    plan_row,
    read_log,
)
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.tasks.start import default_user
from tests.dify_stand_in import DifyStandIn

SINCE = time.time()
USERS = RowUsers("airflow/1234/dag/task/run/2")

RUNNING, PAUSED, SUCCEEDED, PARTIAL, FAILED, STOPPED = (
    WorkflowRunStatus(status) for status in ("running", "paused", "succeeded", "partial-succeeded", "failed", "stopped")
)


def ti_of(**fields: Any) -> Any:
    known = {"dag_id": "dag", "task_id": "task", "map_index": -1, "run_id": "manual", "try_number": 1, "max_tries": 2}
    return SimpleNamespace(**{**known, **fields})


def found(attempt: int, status: WorkflowRunStatus | str, run_id: str = "") -> FoundRun:
    return FoundRun(attempt, run_id or f"run-{attempt}", status)


def logged(
    row: int, attempt: int = 0, status: WorkflowRunStatus | str = SUCCEEDED, *, user: str | None = None, age: float = 0
) -> LoggedWorkflowRun:
    name = USERS.user_of(row, attempt) if user is None else user
    created_at = pendulum.from_timestamp(SINCE + 1 - age)
    return LoggedWorkflowRun(f"{name}@{age}", status, name, None, 0, 0, created_at, None, 0.0)


def play(steps: Any, log: Sequence[LogRow], *, pages: bool = True, grows: bool = False) -> tuple[Any, list[Any]]:
    """Run steps over a log that ignores every filter."""
    calls = []
    try:
        step = next(steps)
        while True:
            assert isinstance(step, Call)
            assert step.params is not None
            calls.append(step.params)
            page, limit = (step.params["page"] if pages else 1), step.params["limit"]
            if grows:
                log = [logged(0, user=f"someone {len(calls)}"), *log]
            step = steps.send(log[(page - 1) * limit : page * limit])
    except StopIteration as done:
        return done.value, calls


# --- users


@pytest.mark.parametrize(
    "change",
    [
        {"dag_id": "other"},
        {"task_id": "other"},
        {"map_index": 0},
        {"run_id": "other"},
        # What Airflow changes when a task is cleared.
        {"max_tries": 3},
    ],
)
def test_another_task_has_other_users(change: dict[str, Any]) -> None:
    one, other = RowUsers.of_task(ti_of()), RowUsers.of_task(ti_of(**change))
    assert one.user_of(0, 0) != other.user_of(0, 0)
    assert other.parse(one.user_of(0, 0)) is None
    assert BatchName.of_task(ti_of()) != BatchName.of_task(ti_of(**change))


def test_each_try_of_a_task_has_the_same_users() -> None:
    one, other = ti_of(try_number=1), ti_of(try_number=2)
    assert RowUsers.of_task(one) == RowUsers.of_task(other)
    assert BatchName.of_task(one) == BatchName.of_task(other)


def test_another_installation_has_other_users(monkeypatch: pytest.MonkeyPatch) -> None:
    one = RowUsers.of_task(ti_of())
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "another")
    assert RowUsers.of_task(ti_of()) != one


@pytest.mark.parametrize("user", [None, "u", "é" * 200, "u" * 255])
@pytest.mark.parametrize("dag_id", ["dag", "d" * 250])
def test_a_user_has_at_most_255_characters_and_tells_row_and_attempt(user: str | None, dag_id: str) -> None:
    users = RowUsers.of_task(ti_of(dag_id=dag_id), user)
    names = {users.user_of(row, attempt) for row in (0, 1, 11, 999_999) for attempt in (0, 1, 11, 99)}
    assert len(names) == 16
    assert max(map(len, names)) <= 255
    assert users.parse(users.user_of(999_999, 99)) == (999_999, 99)
    if user is not None:
        assert users.prefix.startswith(user[:200])
        other = RowUsers.of_task(ti_of(dag_id=dag_id, run_id="other"), user)
        assert other.prefix != users.prefix


def test_long_names_that_begin_alike_are_distinguished() -> None:
    one, other = (RowUsers.of_task(ti_of(dag_id="d" * 250, run_id=run_id)) for run_id in "ab")
    assert one.prefix != other.prefix


@pytest.mark.parametrize(
    "user",
    [
        None,
        "",
        "someone",
        USERS.prefix,
        f"{USERS.prefix}/",
        f"{USERS.prefix}/1",
        f"{USERS.prefix}/1.x",
        f"{USERS.prefix}0/1.0",
    ],
)
def test_what_is_no_row_of_ours_is_none(user: str | None) -> None:
    assert USERS.parse(user) is None


def test_a_run_of_the_single_operator_is_no_row() -> None:
    assert RowUsers.of_task(ti_of()).parse(default_user(ti_of(), 2)) is None


# --- the log


def test_the_log_is_read_in_pages_of_100_up_to_its_end() -> None:
    log = [logged(row) for row in range(249, -1, -1)]
    log.insert(5, logged(0, user="someone else"))
    rows, calls = play(read_log(USERS, SINCE), log)
    assert sorted(rows) == list(range(250))
    assert rows[7] == [FoundRun(0, log[-8].workflow_run_id, SUCCEEDED)]
    assert [(call["page"], call["limit"]) for call in calls] == [(1, 100), (2, 100), (3, 100)]
    assert len({call["created_at__after"] for call in calls}) == 1


def test_a_log_that_grows_while_it_is_read_loses_no_run() -> None:
    rows, _ = play(read_log(USERS, SINCE), [logged(row) for row in range(350)], grows=True)
    assert sorted(rows) == list(range(350))
    assert all(len(runs) == 1 for runs in rows.values())


def test_runs_from_before_are_not_read_where_the_server_can_not_filter() -> None:
    log = [logged(row, age=row * 10) for row in range(1000)]
    rows, calls = play(read_log(USERS, SINCE), log)
    assert len(calls) == 1
    assert 6 in rows


def test_rows_of_others_whose_runs_are_deleted_hide_no_run() -> None:
    gone = [RowWithoutRun(f"row-{number}", None, None) for number in range(250)]
    assert play(read_log(USERS, SINCE), [*gone, logged(7)])[0].keys() == {7}


def test_a_run_of_the_batch_whose_record_is_not_written_yet_is_waited_for() -> None:
    unwritten = RowWithoutRun("row", USERS.user_of(3, 0), pendulum.from_timestamp(time.time() - 200))
    with pytest.raises(DifyConnectionError, match="no record yet of a run of row 3"):
        play(read_log(USERS, SINCE), [unwritten])
    with pytest.raises(DifyConnectionError, match="no record yet of a run of row 3"):
        play(look_for(USERS, 3, 0, SINCE), [unwritten])


@pytest.mark.parametrize("age", [301, None])
def test_a_run_of_the_batch_that_has_no_record_for_five_minutes_was_deleted(age: float | None) -> None:
    logged_at = None if age is None else pendulum.from_timestamp(time.time() - age)
    deleted = RowWithoutRun("row", USERS.user_of(3, 0), logged_at)
    assert play(read_log(USERS, SINCE), [deleted, logged(4)])[0].keys() == {4}
    assert play(look_for(USERS, 3, 0, SINCE), [deleted])[0] is None


def test_a_server_that_knows_no_pages_is_not_read_for_ever() -> None:
    rows, calls = play(read_log(USERS, SINCE), [logged(row) for row in range(150)], pages=False)
    assert len(calls) == 2
    assert len(rows) == 100


def test_the_attempts_of_a_row_are_kept_apart() -> None:
    rows, _ = play(read_log(USERS, SINCE), [logged(3, 1, RUNNING), logged(3, 0, FAILED)])
    assert [(run.attempt, run.status) for run in rows[3]] == [(1, RUNNING), (0, FAILED)]


def test_one_run_is_looked_for_by_its_user() -> None:
    run, calls = play(look_for(USERS, 3, 1, SINCE), [logged(3, 0, FAILED), logged(3, 1, RUNNING)])
    assert (run.attempt, run.status) == (1, RUNNING)
    assert calls[0]["created_by_end_user_session_id"] == USERS.user_of(3, 1)
    assert play(look_for(USERS, 4, 0, SINCE), [logged(3)])[0] is None


# --- a row


@pytest.mark.parametrize(
    ("runs", "retries", "plan"),
    [
        ([], 0, RowPlan(RowAction.START, 0)),
        ([found(0, SUCCEEDED)], 0, RowPlan(RowAction.READ, 0, 0, "run-0")),
        ([found(0, PARTIAL)], 0, RowPlan(RowAction.READ, 0, 0, "run-0")),
        ([found(0, RUNNING)], 0, RowPlan(RowAction.FOLLOW, 0, 0, "run-0")),
        ([found(0, PAUSED)], 0, RowPlan(RowAction.FOLLOW, 0, 0, "run-0")),
        # Its detail tells whether it is over.
        ([found(0, "a new status")], 0, RowPlan(RowAction.FOLLOW, 0, 0, "run-0")),
        ([found(0, FAILED)], 0, RowPlan(RowAction.READ, 0, 1, "run-0")),
        ([found(0, FAILED)], 1, RowPlan(RowAction.START, 1, 1)),
        ([found(0, FAILED), found(1, FAILED)], 1, RowPlan(RowAction.READ, 1, 2, "run-1")),
        ([found(1, RUNNING), found(0, FAILED)], 1, RowPlan(RowAction.FOLLOW, 1, 1, "run-1")),
        ([found(1, SUCCEEDED), found(0, FAILED)], 1, RowPlan(RowAction.READ, 1, 1, "run-1")),
        # Stopped with the task that was killed.
        ([found(0, STOPPED)], 0, RowPlan(RowAction.START, 1)),
        ([found(0, FAILED), found(1, STOPPED)], 1, RowPlan(RowAction.START, 2, 1)),
        # A run that was queued for longer than the grace, and the one that took its place.
        ([found(0, RUNNING, "late"), found(0, SUCCEEDED, "early")], 0, RowPlan(RowAction.READ, 0, 0, "early")),
    ],
)
def test_a_row_goes_on_from_what_its_runs_are(runs: list[FoundRun], retries: int, plan: RowPlan) -> None:
    assert plan_row(runs, run_retries=retries) == plan
    assert plan_row(runs[::-1], run_retries=retries) == plan


def test_a_run_that_was_stopped_is_not_followed_although_its_record_is_running() -> None:
    plan = plan_row([found(0, RUNNING)], run_retries=0, stopped_runs=frozenset({"run-0"}))
    assert plan == RowPlan(RowAction.START, 1)


# --- the batch


def actions(resumption: Resumption, rows: range) -> dict[str, list[int]]:
    planned: dict[str, list[int]] = {}
    for row in rows:
        planned.setdefault(resumption.plan(row).action.value, []).append(row)
    return planned


def test_a_fresh_batch_starts_every_row() -> None:
    assert actions(Resumption({}, max_active_runs=8, is_fresh=True), range(20)) == {"start": list(range(20))}


def test_no_more_rows_are_uncertain_than_were_in_hand() -> None:
    runs = {0: [found(0, SUCCEEDED)], 1: [found(0, RUNNING)], 3: [found(0, RUNNING)]}
    assert actions(Resumption(runs, max_active_runs=4), range(10)) == {
        "read": [0],
        "follow": [1, 3],
        "look_for": [2, 4, 5, 6],
        "start": [7, 8, 9],
    }


def test_a_run_that_is_running_may_have_left_its_place() -> None:
    # It was given up at its `run_timeout`, and Dify 1.13 and 1.14 never write its end. The start after it was queued.
    assert Resumption({0: [found(0, RUNNING)]}, max_active_runs=1).plan(1) == RowPlan(RowAction.LOOK_FOR)


def test_every_row_before_the_last_known_one_is_uncertain() -> None:
    runs = {6: [found(0, RUNNING)]}
    assert actions(Resumption(runs, max_active_runs=2), range(9))["look_for"] == [0, 1, 2, 3, 4, 5]
    assert actions(Resumption({}, max_active_runs=1, last_written=3), range(9))["look_for"] == [0, 1, 2]


def test_rows_after_a_crash_before_the_first_run_are_looked_for() -> None:
    assert actions(Resumption({}, max_active_runs=3), range(6)) == {"look_for": [0, 1, 2], "start": [3, 4, 5]}


def test_each_try_that_crashed_may_have_started_rows_beside_those_that_it_looked_for() -> None:
    # The first started rows 0 and 1; the second looked for them, and started 2 and 3. All four may be queued.
    resumption = Resumption({}, max_active_runs=2, earlier_tries=2)
    assert actions(resumption, range(6)) == {"look_for": [0, 1, 2, 3], "start": [4, 5]}


def test_the_limit_of_the_try_that_crashed_counts_if_it_was_higher() -> None:
    resumption = Resumption({}, max_active_runs=2, checkpoint=Checkpoint(0, 5))
    assert actions(resumption, range(8))["look_for"] == [0, 1, 2, 3, 4]


def test_the_next_attempt_of_a_run_that_failed_may_be_under_way() -> None:
    resumption = Resumption({0: [found(0, FAILED)]}, max_active_runs=1, run_retries=2)
    assert resumption.plan(0) == RowPlan(RowAction.LOOK_FOR, 1, 1)
    assert resumption.plan_found(0, found(1, RUNNING)) == RowPlan(RowAction.FOLLOW, 1, 1, "run-1")
    assert resumption.plan_found(0, found(1, FAILED)) == RowPlan(RowAction.START, 2, 2)


def test_a_run_that_was_stopped_with_the_task_leaves_its_place() -> None:
    resumption = Resumption({0: [found(0, RUNNING)]}, max_active_runs=1, checkpoint=Checkpoint(0, 1, ("run-0",)))
    assert resumption.plan(0) == RowPlan(RowAction.LOOK_FOR, 1)


# --- over HTTP


def test_the_runs_of_a_batch_are_found_among_thousands_of_others(
    dify: DifyStandIn, dify_connection: str, dialect: str
) -> None:
    users = RowUsers.of_task(ti_of())
    now = time.time()
    dify.add_logged_runs(5_000, user="someone else", ending=now - 4_000)
    dify.add_logged_runs(1_000, user=lambda number: users.user_of(number, 0), ending=now - 200)
    dify.add_logged_runs(150, user="someone else", ending=now)
    failed = dify.add_run("failed", user=users.user_of(1_000, 0), created_at=int(now))
    alive = dify.add_run("running", user=users.user_of(1_000, 1))
    with DifyHook() as hook:
        rows = hook.run_steps(read_log(users, now - 2_000))
        assert hook.run_steps(look_for(users, 1_000, 1, now - 100)) == FoundRun(1, alive, RUNNING)
        assert hook.run_steps(look_for(users, 1_000, 2, now - 100)) is None
    assert sorted(rows) == list(range(1_001))
    assert {run.workflow_run_id for run in rows[1_000]} == {failed, alive}
    pages = [request.path for request in dify.requests if "limit=100" in request.path]
    # Dify filters by time: the 5,000 from before are not read.
    assert len(pages) == 12
