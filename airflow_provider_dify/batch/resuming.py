"""
Which runs of a batch are there already: after a crash, or a try that Airflow repeats, nothing is paid twice. No I/O.

Each run's ``user`` names the batch, the row and the attempt, so that Dify's log tells which rows have runs. What is
over is read, what is alive is followed, what failed may be started again, and the rest is started.

A run that is queued at Dify is not in the log yet. Nobody can say whether such a row was started before the crash, but
rows are started in order, and each try has no more than ``max_active_runs`` of them in hand at once, beside those that
it looks for. So of the rows that neither log nor results show, only the first few are *uncertain*: those before the
last row that is known, and after it as many as all earlier tries may have had in hand. Runs that are alive don't make
them fewer: a row may have given up its run, whose record stays ``running``. The uncertain rows are looked for until a
grace is over, while other rows go on, and are started then.

One window can't be closed: a start that Dify took just before the crash, and that stays queued until after the grace.
Such a row runs, and is paid, twice: as the queued run, and as the one that this try starts. There is no such window on
Dify 1.12, which queues no runs, nor where Dify has a free worker within the grace. A server that writes its log late (a
Dify with its repositories on Celery, by up to 15 seconds) is the same case. Rows are known by their number, so the
inputs must not change between two tries of a task.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from enum import Enum

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Steps
from airflow_provider_dify.api.models import (
    WAITING_STATUSES,
    LogRow,
    RowWithoutRun,
    WorkflowRunStatus,
    is_deleted,
    row_key,
)
from airflow_provider_dify.batch.naming import RowUsers
from airflow_provider_dify.batch.results import Checkpoint
from airflow_provider_dify.runs.log import CLOCK_TOLERANCE, LogPage, without_record
from airflow_provider_dify.tasks.start import SECONDS_FOR_LOG

_PAGE_SIZE = 100


@dataclass(frozen=True)
class FoundRun:
    """
    A run of the batch that Dify's log shows.

    :param attempt: the attempt, from 0.
    :param workflow_run_id: its UUID.
    :param status: its status.
    """

    attempt: int
    workflow_run_id: str
    status: WorkflowRunStatus | str


class RowAction(str, Enum):
    """What is to be done with a row."""

    READ = "read"
    FOLLOW = "follow"
    LOOK_FOR = "look_for"
    START = "start"


@dataclass(frozen=True)
class RowPlan:
    """
    What is to be done with a row.

    :param action: read the run that is over; follow the one that is alive; look for the one that may be queued, and
        start it after the grace; or start it.
    :param attempt: the attempt that the action is about.
    :param failures: runs of the row that failed, and count against ``run_retries``.
    :param workflow_run_id: the run to read or to follow.
    """

    action: RowAction
    attempt: int = 0
    failures: int = 0
    workflow_run_id: str | None = None


def read_log(users: RowUsers, since: float) -> Steps[dict[int, list[FoundRun]]]:
    """
    Read which runs of a batch Dify's log shows.

    The log can be searched for one user, not for the beginning of one, so it is read whole, in pages of 100 (which cost
    the server a quarter of a second each), from the checkpoint on: what was over before is in the results.

    :param users: the batch's users.
    :param since: epoch seconds, by this machine's clock, from which on runs are of interest.
    :return: runs by row.
    :raises DifyError: if the log can't be read.
    """
    not_before = datetime.fromtimestamp(since, timezone.utc) - CLOCK_TOLERANCE
    found: dict[int, list[FoundRun]] = {}
    seen: set[str] = set()
    page: LogPage | None = LogPage(_PAGE_SIZE)
    while page is not None:
        rows: list[LogRow] = yield page.request(created_after=not_before, patience=SECONDS_FOR_LOG)
        # Two pages may show a run twice. A page with nothing new is the end, too: of a server that doesn't know pages.
        new = [row for row in rows if row_key(row) not in seen]
        seen = {row_key(row) for row in rows}
        for row in new:
            _take(users, row, found)
        page = page.after(rows, not_before=not_before) if new else None
    return found


def look_for(users: RowUsers, row: int, attempt: int, since: float) -> Steps[FoundRun | None]:
    """
    Look for one run that may have been started.

    :param users: the batch's users.
    :param row: the row.
    :param attempt: the attempt.
    :param since: as for :func:`read_log`.
    :return: the run; ``None`` while the log doesn't show it.
    :raises DifyError: if the log can't be read.
    """
    not_before = datetime.fromtimestamp(since, timezone.utc) - CLOCK_TOLERANCE
    user = users.user_of(row, attempt)
    rows: list[LogRow] = yield calls.logged_runs(
        user=user, created_after=not_before, limit=20, patience=SECONDS_FOR_LOG
    )
    found: dict[int, list[FoundRun]] = {}
    for logged in rows:
        _take(users, logged, found)
    runs = [run for run in found.get(row, ()) if run.attempt == attempt]
    return _best(runs) if runs else None


def _take(users: RowUsers, logged: LogRow, found: dict[int, list[FoundRun]]) -> None:
    which = users.parse(logged.user)
    if which is None:
        return
    row, attempt = which
    if isinstance(logged, RowWithoutRun):
        if is_deleted(logged, time.time()):
            return
        raise without_record(f"a run of row {row}")
    run = FoundRun(attempt, logged.workflow_run_id, logged.status)
    runs = found.setdefault(row, [])
    if run.workflow_run_id not in {other.workflow_run_id for other in runs}:
        runs.append(run)


class Resumption:
    """
    What is to be done with each row, after an earlier try. To be asked in row order.

    :param found: what :func:`read_log` returned, without rows whose results are written; empty for a batch that starts
        afresh.
    :param max_active_runs: rows that may be in hand at once in this try.
    :param run_retries: how often a row's run that failed is started again.
    :param checkpoint: the earlier tries' checkpoint, if there is one.
    :param last_written: the last row whose result is written; -1 for none.
    :param is_fresh: whether no earlier try can have started anything.
    :param earlier_tries: how many there were: each may have started rows beside those that it looked for.
    :ivar last_uncertain: the last row that an earlier try may have started; -1 for none.
    """

    def __init__(
        self,
        found: Mapping[int, list[FoundRun]],
        *,
        max_active_runs: int,
        run_retries: int = 0,
        checkpoint: Checkpoint | None = None,
        last_written: int = -1,
        is_fresh: bool = False,
        earlier_tries: int = 1,
    ) -> None:
        self._found = found
        self._run_retries = run_retries
        self._stopped = frozenset(checkpoint.stopped_runs if checkpoint else ())
        # The argument may have been lowered since.
        in_hand = max(max_active_runs, checkpoint.max_active_runs if checkpoint else 0) * max(1, earlier_tries)
        self._uncertain_left = 0 if is_fresh else in_hand
        self._last_known = max([last_written, *found])
        self.last_uncertain = -1 if is_fresh else self._last_known + in_hand

    def plan(self, row: int) -> RowPlan:
        """
        Return what is to be done with a row that has no result yet. Each row is asked for once, in row order.

        :param row: a row whose inputs pass the check; others are never started.
        """
        plan = self._plan_known(self._found.get(row, ()))
        if plan.action is not RowAction.START:
            return plan
        is_uncertain = self._uncertain_left > 0 or row < self._last_known
        self._uncertain_left -= 1
        return replace(plan, action=RowAction.LOOK_FOR) if is_uncertain else plan

    def plan_found(self, row: int, run: FoundRun) -> RowPlan:
        """
        Return what is to be done with a row whose run was looked for and found.

        :param row: the row.
        :param run: its run, as :func:`look_for` returned it.
        """
        return self._plan_known([*self._found.get(row, ()), run])

    def _plan_known(self, runs: Iterable[FoundRun]) -> RowPlan:
        return plan_row(runs, run_retries=self._run_retries, stopped_runs=self._stopped)


def plan_row(runs: Iterable[FoundRun], *, run_retries: int, stopped_runs: frozenset[str] = frozenset()) -> RowPlan:
    """
    Return what is to be done with a row that has no result yet, from the runs that it has.

    A run that was stopped is started again, as the single operator does after a crash: it was stopped with the task.

    :param runs: the row's runs in Dify's log, in any order.
    :param run_retries: how often a run that failed is started again.
    :param stopped_runs: UUIDs of runs that Dify was asked to stop, whatever their records say.
    """
    known = list(runs)
    good = [run for run in known if _is_over(run) and run.status not in _BAD]
    if good:
        best = _best(good)
        return RowPlan(RowAction.READ, best.attempt, _failures(known), best.workflow_run_id)
    alive = [run for run in known if _is_alive(run) and run.workflow_run_id not in stopped_runs]
    if alive:
        best = _best(alive)
        return RowPlan(RowAction.FOLLOW, best.attempt, _failures(known), best.workflow_run_id)
    failures = _failures(known)
    failed = [run for run in known if run.status == WorkflowRunStatus.FAILED]
    if failed and failures > run_retries:
        last = _best(failed)
        return RowPlan(RowAction.READ, last.attempt, failures, last.workflow_run_id)
    return RowPlan(RowAction.START, max((run.attempt + 1 for run in known), default=0), failures)


_BAD = frozenset({WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED})
_ORDER: dict[str, int] = {WorkflowRunStatus.SUCCEEDED: 3, WorkflowRunStatus.PARTIAL_SUCCEEDED: 2}


def _best(runs: list[FoundRun]) -> FoundRun:
    """Return the run to take of several: one that succeeded, else one that is alive, else the last attempt."""
    return max(runs, key=lambda run: (_ORDER.get(run.status, int(_is_alive(run))), run.attempt))


def _failures(runs: list[FoundRun]) -> int:
    return sum(run.status == WorkflowRunStatus.FAILED for run in runs)


def _is_over(run: FoundRun) -> bool:
    return isinstance(run.status, WorkflowRunStatus) and run.status not in WAITING_STATUSES


def _is_alive(run: FoundRun) -> bool:
    # A status that isn't known here is followed: its detail tells whether it is over.
    return not _is_over(run)
