"""Which runs of a batch are there already, by what Dify's log shows."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import Any

import pendulum
import pytest

from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.models import LoggedWorkflowRun, WorkflowRunStatus
from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.resuming import EarlierTries, FoundRun, Resumption, RowPlan, plan_row
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.runs.waiting import Deadline, WaitArguments
from tests.unit.batches import ti_of

SINCE = time.time()
USERS = RowUsers("airflow/1234/dag/task/run/2")

RUNNING, PAUSED, SUCCEEDED, PARTIAL, FAILED, STOPPED = (
    WorkflowRunStatus(status) for status in ("running", "paused", "succeeded", "partial-succeeded", "failed", "stopped")
)


def found(attempt: int, status: WorkflowRunStatus | str, run_id: str = "") -> FoundRun:
    return FoundRun(attempt, run_id or f"run-{attempt}", status)


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
    assert BatchName.of_task(ti_of()) != BatchName.of_task(ti_of(**change))


def test_each_try_of_a_task_has_the_same_users_and_another_installation_has_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    one, other = ti_of(try_number=1), ti_of(try_number=2)
    assert RowUsers.of_task(one) == RowUsers.of_task(other)
    assert BatchName.of_task(one) == BatchName.of_task(other)
    here = RowUsers.of_task(one)
    monkeypatch.setenv("AIRFLOW__CORE__FERNET_KEY", "another")
    assert RowUsers.of_task(one) != here


@pytest.mark.parametrize("user", [None, "u", "é" * 200, "u" * 255])
@pytest.mark.parametrize("dag_id", ["dag", "d" * 250])
def test_a_user_has_at_most_255_characters_and_tells_row_and_attempt(user: str | None, dag_id: str) -> None:
    users = RowUsers.of_task(ti_of(dag_id=dag_id), user)
    names = {users.user_of(row, attempt) for row in (0, 1, 11, 999_999) for attempt in (0, 1, 11, 99)}
    assert len(names) == 16
    assert max(map(len, names)) <= 255
    if user is not None:
        assert users.prefix.startswith(user[:200])
    other = RowUsers.of_task(ti_of(dag_id=dag_id, run_id="other"), user)
    assert other.prefix != users.prefix


# --- a row


@pytest.mark.parametrize(
    ("runs", "retries", "plan"),
    [
        ([], 0, RowPlan(0)),
        ([found(0, SUCCEEDED)], 0, RowPlan(0, 0, "run-0")),
        ([found(0, PARTIAL)], 0, RowPlan(0, 0, "run-0")),
        ([found(0, RUNNING)], 0, RowPlan(0, 0, "run-0")),
        ([found(0, PAUSED)], 0, RowPlan(0, 0, "run-0")),
        # Its detail tells whether it is over.
        ([found(0, "a new status")], 0, RowPlan(0, 0, "run-0")),
        ([found(0, FAILED)], 0, RowPlan(0, 1, "run-0")),
        ([found(0, FAILED)], 1, RowPlan(1, 1)),
        ([found(0, FAILED), found(1, FAILED)], 1, RowPlan(1, 2, "run-1")),
        ([found(1, RUNNING), found(0, FAILED)], 1, RowPlan(1, 1, "run-1")),
        ([found(1, SUCCEEDED), found(0, FAILED)], 1, RowPlan(1, 1, "run-1")),
        # Stopped with the task that was killed.
        ([found(0, STOPPED)], 0, RowPlan(1)),
        ([found(0, FAILED), found(1, STOPPED)], 1, RowPlan(2, 1)),
        # A run that was queued for longer than the grace, and the one that took its place.
        ([found(0, RUNNING, "late"), found(0, SUCCEEDED, "early")], 0, RowPlan(0, 0, "early")),
    ],
)
def test_a_row_goes_on_from_what_its_runs_are(runs: list[FoundRun], retries: int, plan: RowPlan) -> None:
    assert plan_row(runs, run_retries=retries) == plan
    assert plan_row(runs[::-1], run_retries=retries) == plan


# --- the window


def raise_it(error: DifyConnectionError, failures: int) -> None:
    raise error


def resumption(log: dict[str, str] | None = None, **earlier: Any) -> Played:
    """Return a resumption over a log of statuses by row and attempt, such as ``{"3.0": "running"}``."""
    arguments = {name: earlier.pop(name) for name in ("max_active_runs", "run_retries") if name in earlier}
    if "known_limit" in earlier:
        earlier["max_active_runs"] = earlier.pop("known_limit")
    known = EarlierTries(**{"since": SINCE, "can_be": True, "number": 1, "has_parts": True, **earlier})
    return Played(Resumption(USERS, known, **{"max_active_runs": 2, **arguments}), log or {})


class Played:
    """A resumption whose looks are taken at once, without a grace."""

    def __init__(self, real: Resumption, log: dict[str, str]) -> None:
        self.real = real
        self.asked: list[str] = []
        self._log = log

    def plan(self, row: int) -> RowPlan:
        assert self.real.may_take
        return self.find(row) if self.real.take(row) else RowPlan()

    def find(self, row: int) -> RowPlan:
        arguments = WaitArguments(poll_interval=1.0, max_consecutive_failures=0)
        find = self.real.find(self, row, Deadline.after(3600), arguments, raise_it, lambda: False)  # type: ignore[arg-type]
        return asyncio.run(find)

    async def perform(self, call: Call[Any]) -> Any:
        assert call.params is not None
        user = call.params["created_by_end_user_session_id"]
        name = user.removeprefix(f"{USERS.prefix}/")
        self.asked.append(name)
        if name not in self._log:
            return []
        status, created_at = WorkflowRunStatus(self._log[name]), pendulum.from_timestamp(SINCE)
        return [LoggedWorkflowRun(f"run-{name}", status, user, None, 0, 0, created_at, None, 0)]

    def rows_looked_for(self, rows: Iterable[int]) -> list[int]:
        for row in rows:
            self.plan(row)
        return sorted({int(name.partition(".")[0]) for name in self.asked})


FOUND = {f"{row}.0": "succeeded" for row in range(3, 50, 4)}


@pytest.mark.parametrize(
    ("earlier", "rows", "looked_for"),
    [
        # The first try.
        ({"can_be": False, "number": 0, "has_parts": False}, range(20), []),
        # Two under way, and two that Dify turned away since the last part; so for each try.
        ({}, range(20), [0, 1, 2, 3]),
        ({"number": 2}, range(20), list(range(8))),
        ({"max_active_runs": 1, "number": 0}, range(20), [0, 1]),
        # The limit of the try that crashed, if it was higher.
        ({"known_limit": 3}, range(20), list(range(6))),
        # Rows before the last known one, and those behind it; rows that Dify is never asked to run don't count.
        ({"last_row": 7}, [2, 5, *range(8, 30)], [2, 5, 8, 9, 10, 11]),
        ({}, range(100, 120), [100, 101, 102, 103]),
        # Without the parts of an earlier try: all of them. A task that was cleared has no earlier try.
        ({"has_parts": False, "number": 1}, range(20), list(range(20))),
        ({"has_parts": False, "number": 0}, range(20), [0, 1, 2, 3]),
        # Each run that is found carries the window on.
        ({"log": FOUND}, range(80), list(range(52))),
    ],
)
def test_no_more_rows_are_looked_for_than_earlier_tries_may_have_begun(
    earlier: dict[str, Any], rows: Iterable[int], looked_for: list[int]
) -> None:
    assert resumption(**earlier).rows_looked_for(rows) == looked_for


def test_a_row_behind_the_window_waits_for_the_looks_that_may_carry_it_on() -> None:
    played = resumption({"2.0": "running"})
    assert all(played.real.may_take and played.real.take(row) for row in range(4))
    assert not played.real.may_take
    for row in (0, 1, 3):
        played.find(row)
    assert not played.real.may_take
    assert played.find(2) == RowPlan(0, 0, "run-2.0")
    assert played.rows_looked_for(range(4, 20)) == list(range(7))


def test_no_more_than_eight_rows_are_looked_for_at_once() -> None:
    played = resumption(last_row=100)
    taken = 0
    while played.real.may_take:
        assert played.real.take(taken)
        taken += 1
    assert taken == 8


# --- attempts


@pytest.mark.parametrize(
    ("log", "retries", "plan", "asked"),
    [
        ({}, 0, RowPlan(), ["0.0"]),
        ({"0.0": "succeeded"}, 2, RowPlan(0, 0, "run-0.0"), ["0.0"]),
        ({"0.0": "failed"}, 0, RowPlan(0, 1, "run-0.0"), ["0.0"]),
        ({"0.0": "failed"}, 1, RowPlan(1, 1), ["0.0", "0.1"]),
        ({"0.0": "failed", "0.1": "running"}, 2, RowPlan(1, 1, "run-0.1"), ["0.0", "0.1"]),
        ({"0.0": "failed", "0.1": "failed"}, 2, RowPlan(2, 2), ["0.0", "0.1", "0.2"]),
        ({"0.0": "stopped"}, 0, RowPlan(1, 0), ["0.0", "0.1"]),
        ({"0.0": "stopped", "0.1": "running"}, 0, RowPlan(1, 0, "run-0.1"), ["0.0", "0.1"]),
        # The first start got lost, or Dify said that it failed to start it: the second one has a run.
        ({"0.1": "running"}, 1, RowPlan(1, 0, "run-0.1"), ["0.0", "0.1"]),
        ({"0.0": "stopped", "0.2": "running"}, 1, RowPlan(2, 0, "run-0.2"), ["0.0", "0.1", "0.2"]),
    ],
)
def test_a_rows_attempts_are_asked_for_as_far_as_there_may_be_any(
    log: dict[str, str], retries: int, plan: RowPlan, asked: list[str]
) -> None:
    played = resumption(log, run_retries=retries)
    assert played.plan(0) == plan
    assert played.asked == asked


def test_a_run_that_was_stopped_with_the_task_is_not_followed_although_its_record_is_running() -> None:
    played = resumption({"0.0": "running"}, stopped_runs=frozenset({"run-0.0"}))
    assert played.plan(0) == RowPlan(1)
