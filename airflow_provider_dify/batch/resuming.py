# SPDX-License-Identifier: Apache-2.0
"""
Which runs of a batch are there already: after a crash, or a try that Airflow repeats, nothing is paid twice. No I/O.

The ``user`` of a run names the batch, the row and the attempt. So Dify's log can be asked for the runs of one row.

Rows are started in order. So those that an earlier try may have started end soon after the last row that has a result
or a run: each try has at most ``max_active_runs`` rows under way, and no more than as many that left no trace, because
Dify turned them away and no part says so yet. This *window* goes on from each row whose run is found. Rows beyond it
are started, as soon as no look is under way that may widen it.

A run that is queued at Dify is not in the log yet. So a row of the window is looked for until a grace is over, while
other rows go on, and is started then. One case can't be told: a start that stays queued for longer, or whose row a
server writes later. It runs, and is paid, twice. Rows are known by their number, so the inputs must not change.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.models import ENDED_STATUSES, GOOD_STATUSES, WorkflowRunStatus
from airflow_provider_dify.batch.naming import RowUsers
from airflow_provider_dify.exceptions import BATCH_SECTION, DifyConnectionError, DifyError
from airflow_provider_dify.runs.log import RunSearch, until, user_runs
from airflow_provider_dify.runs.waiting import Deadline, WaitArguments
from airflow_provider_dify.tasks.start import SECONDS_FOR_LOG

# Rows that are looked for at once.
MOST_LOOKS = 8


@dataclass(frozen=True)
class EarlierTries:
    """What earlier tries may have started, as far as Airflow and the parts of the results tell."""

    since: float  # Epoch seconds from which on Dify's log may have runs of the batch.
    can_be: bool
    number: int  # Since the task was cleared; a Dag whose `retries` were lowered may mislead.
    has_parts: bool = False  # Whether no part is missing, so that what has neither a result nor a run is recent.
    last_row: int = -1  # The last one that was certainly begun.
    max_active_runs: int = 0
    stopped_runs: frozenset[str] = frozenset()  # Whatever their records say.


@dataclass(frozen=True)
class FoundRun:
    """A run of a row in Dify's log; the row's attempts count from 0."""

    attempt: int
    workflow_run_id: str
    status: WorkflowRunStatus | str


@dataclass(frozen=True)
class RowPlan:
    """What is to be done with a row: wait for the run that it has, or start its next attempt."""

    attempt: int = 0
    failures: int = 0  # Runs of the row that failed, and count against `run_retries`.
    workflow_run_id: str | None = None


class Resumption:
    """Which rows an earlier try may have started, and what Dify's log has of them."""

    def __init__(
        self,
        users: RowUsers,
        earlier: EarlierTries,
        *,
        max_active_runs: int,
        run_retries: int = 0,
        on_look: Callable[[], None] = lambda: None,
    ) -> None:
        self._users = users
        self._earlier = earlier
        self._run_retries = run_retries
        self._on_look = on_look
        # The argument may have been lowered since.
        self._width = 2 * max(max_active_runs, earlier.max_active_runs) * max(1, earlier.number)
        # Rows are counted as their turns come: those that Dify is never asked to run are none of them.
        self._turn = 0
        self._end = self._width if earlier.can_be else 0
        # The turn of each row that was not looked for yet.
        self._looking: dict[int, int] = {}
        self._slots = asyncio.Semaphore(MOST_LOOKS)
        self._has_queue = earlier.number > 0
        # Without the parts nobody knows where the window begins, so that each row is looked for, at least once.
        self._is_endless = earlier.number > 0 and not earlier.has_parts

    @property
    def may_take(self) -> bool:
        """Whether the next row's turn may come now."""
        is_in_window = self._is_endless or self._turn < self._end
        return not self._looking or (is_in_window and len(self._looking) < MOST_LOOKS)

    def take(self, row: int) -> bool:
        """Take the next row, in row order; return whether it is to be looked for, by :meth:`find`."""
        turn, self._turn = self._turn, self._turn + 1
        if row <= self._earlier.last_row:
            self._end = max(self._end, turn + 1 + self._width)
        if not self._is_endless and turn >= self._end:
            return False
        self._looking[row] = turn
        return True

    async def find(
        self,
        client: DifyClient,
        row: int,
        deadline: Deadline,
        arguments: WaitArguments,
        on_failure: Callable[[DifyConnectionError, int], None],
        has_queued_runs: Callable[[], bool],
    ) -> RowPlan:
        """Look for a row's run; without one, until the grace is over. Without the log, runs would be paid twice."""
        ends = time.monotonic() + arguments.not_found_grace
        turn = self._looking[row]
        plan = RowPlan()

        async def look() -> RowPlan | None:
            nonlocal plan
            async with self._slots:
                plan = await self._look(client, row)
            if self._looking.pop(row, None) is not None:
                if plan != RowPlan():
                    self._end = max(self._end, turn + 1 + self._width)
                    self._has_queue = True
                self._on_look()
            may_be_queued = self._has_queue and turn < self._end
            return plan if plan.workflow_run_id is not None or not may_be_queued else None

        def seconds_left(has_failed: bool) -> float:
            # What can't be read, or may be in Dify's queue, can't be missed.
            return math.inf if has_failed or has_queued_runs() else ends - time.monotonic()

        await until(look, deadline, on_failure, interval_seconds=arguments.poll_interval, seconds_left=seconds_left)
        return plan

    async def _look(self, client: DifyClient, row: int) -> RowPlan:
        """Ask for a row's attempts in turn, as far as there may be any: some have no run, and the next one has."""
        found: list[FoundRun] = []
        plan = RowPlan()
        attempt = 0
        while plan.workflow_run_id is None and attempt <= plan.attempt + self._run_retries - plan.failures:
            search = RunSearch(self._users.user_of(row, attempt), self._earlier.since, user_is_unique=True)
            runs, are_all = await user_runs(client, search, patience_seconds=SECONDS_FOR_LOG)
            if not runs and not are_all:
                raise DifyError(
                    f"Dify's log of user {search.user!r} has too many runs of others to find row {row}."
                ).explained_in(BATCH_SECTION)
            found += [FoundRun(attempt, run.workflow_run_id, run.status) for run in runs]
            plan = plan_row(found, run_retries=self._run_retries, stopped_runs=self._earlier.stopped_runs)
            attempt += 1
        return plan


def plan_row(known: Iterable[FoundRun], *, run_retries: int, stopped_runs: frozenset[str] = frozenset()) -> RowPlan:
    """
    Return what is to be done with a row, from the runs that it has. One that was stopped is started again, as the
    single operator does after a crash: it was stopped with the task.
    """
    runs = sorted(known, key=lambda run: (run.status == WorkflowRunStatus.SUCCEEDED, run.attempt), reverse=True)
    over = [run for run in runs if run.status in ENDED_STATUSES]
    good = [run for run in over if run.status in GOOD_STATUSES]
    failed = [run for run in over if run not in good and run.status != WorkflowRunStatus.STOPPED]
    # A status that isn't known here is followed: its detail tells whether it is over.
    alive = [run for run in runs if run not in over and run.workflow_run_id not in stopped_runs]
    wanted = good or alive or (failed if len(failed) > run_retries else [])
    if wanted:
        return RowPlan(wanted[0].attempt, len(failed), wanted[0].workflow_run_id)
    return RowPlan(max((run.attempt + 1 for run in runs), default=0), len(failed))
