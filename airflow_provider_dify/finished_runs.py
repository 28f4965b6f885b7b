"""
Which workflow runs of an app have ended since the last look, whoever started them. Pure.

Dify has no callback for a run that ends. Its log lists runs by the time of their row, the newest first, and a row costs
the server about 2.5 ms. So a window remembers how far the log was read, and which runs were not over then.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timezone

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Steps
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyRequestError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.log_pages import LogPage
from airflow_provider_dify.models import RECORD_DELAY, LoggedWorkflowRun, LogRow, WorkflowRun, row_key, time_of
from airflow_provider_dify.run_window import MAX_OPEN, OVERLAP, FinishedRun, Look, OpenRun, RunWindow, WindowPolicy

PAGE_SIZE = 20
# Pages of the first look: runs that go on then are watched if they are among so many of the newest.
FIRST_PAGES = 3
# Pages without anything new after which a server counts as one that shows the same page again and again.
MAX_STALE_PAGES = 3
# A page costs the server as much as about four details.
_RUNS_WORTH_A_PAGE = 4
# Details that one look asks for at most, a second or two of the server's time; the others wait for the next one.
DETAILS_AT_ONCE = 100
# Seconds by which Dify's clock may be ahead of ours. A row from farther ahead, of a clock that was set right since,
# must not hide what comes until then.
MAX_AHEAD = 86_400.0
# Seconds of the log that are read at most after a time without a look, unless run_timeout is longer.
CATCH_UP = 86_400.0


def look_at_runs(window: RunWindow, policy: WindowPolicy, now: float) -> Steps[Look]:
    """
    Look which of an app's runs have ended.

    :param window: what is known from the last look; it stays as it is, so that a look that fails changes nothing.
    :param policy: how the window moves.
    :param now: epoch seconds of this look.
    :return: what it brought, and the next window.
    :raises DifyError: if the log can't be read.
    """
    reader = _Reader(window, policy, now)
    page: LogPage | None = LogPage(PAGE_SIZE)
    while page is not None:
        rows = yield page.request(user=policy.user, created_after=reader.created_after)
        page = page.after(rows) if reader.needs_page_after(rows) else None
    error = None
    for run_id in reader.runs_to_ask_for():
        try:
            run = yield from calls.look_up_run(run_id)
        except DifyAuthenticationError:
            raise
        except (DifyWorkflowRunNotFound, DifyRequestError):
            # Deleted, or another app's key was given to the connection: asked for again, until run_timeout is over.
            continue
        except DifyConnectionError as failed:
            error = failed
            break
        reader.take_detail(run)
    return reader.look(error)


class _Reader:
    """One look: takes rows and details, and returns what to ask for next."""

    def __init__(self, window: RunWindow, policy: WindowPolicy, now: float) -> None:
        self._policy = policy
        self._now = now
        self._is_first = window.read_until is None
        self._read_until = window.read_until
        if self._read_until is not None and self._read_until > now + MAX_AHEAD:
            self._read_until = now
        self._seen = dict(window.seen)
        self._open = dict(window.open)
        self._finished: dict[str, FinishedRun] = {}
        self._met: set[str] = set()
        # Whose record may come yet: the oldest row.
        self._awaited = math.inf
        self._pages = self._stale_pages = 0
        # Rows from here on are new unless they were seen; the others were read at an earlier look.
        if self._read_until is None:
            # Never by chance, where Dify's clock is ahead of ours.
            self._bound = now - policy.lookback if policy.lookback else math.inf
        else:
            self._bound = max(self._read_until - OVERLAP, now - max(policy.run_timeout, CATCH_UP))

    @property
    def created_after(self) -> datetime | None:
        """The time that the server's filter gets."""
        if self._is_first:
            return None
        due = [run.logged_at for run in self._due().values()]
        # A few are cheaper to ask for one at a time.
        oldest = min(due) if len(due) >= _RUNS_WORTH_A_PAGE else self._bound
        # Whole seconds, so that watchers which are a moment apart ask the same.
        return datetime.fromtimestamp(int(min(self._bound, oldest)), timezone.utc)

    def needs_page_after(self, rows: Sequence[LogRow]) -> bool:
        """Take a page of rows, and return whether the next page is needed, if there is one."""
        self._pages += 1
        news = [row for row in rows if row_key(row) not in self._met]
        for row in news:
            self._take_row(row)
        self._stale_pages = 0 if news else self._stale_pages + 1
        if not rows or self._stale_pages >= MAX_STALE_PAGES:
            return False
        times = [_logged_at(row, self._now) for row in rows]
        newest, oldest = max(times), min(times)
        if oldest >= self._bound or (self._is_first and self._pages < FIRST_PAGES):
            return True
        # The next page covers about as much time as this one.
        after = oldest - (newest - oldest)
        likely = sum(after <= run.logged_at <= oldest for run in self._due().values())
        return likely >= _RUNS_WORTH_A_PAGE

    def runs_to_ask_for(self) -> list[str]:
        """Return the ids of runs to ask for one at a time, those that have waited longest first."""
        due = self._due()
        chosen = sorted(due, key=lambda run_id: due[run_id].due)[:DETAILS_AT_ONCE]
        for run_id in chosen:
            # Whatever comes of it, so that one that can't be read doesn't hold the others up.
            self._postpone(run_id, due[run_id])
        return chosen

    def take_detail(self, run: WorkflowRun) -> None:
        """Take the detail of a run that was asked for."""
        known = self._open.get(run.id)
        if known is not None and run.is_over:
            self._finish(run.id, run, known.user, known.triggered_from)

    def look(self, error: DifyConnectionError | None) -> Look:
        """Return what the look brought."""
        overdue = {
            run_id for run_id, run in self._open.items() if self._now - run.created_at > self._policy.run_timeout
        }
        watched = {run_id: run for run_id, run in self._open.items() if run_id not in overdue}
        surplus = sorted(watched, key=lambda run_id: watched[run_id].created_at)[: max(0, len(watched) - MAX_OPEN)]
        for run_id in surplus:
            del watched[run_id]
        # Of an app without runs, everything that comes is new.
        read_until = min(self._read_until or 0.0, self._awaited)
        bound = self._bound if self._read_until is None else read_until - OVERLAP
        return Look(
            RunWindow(
                read_until=read_until,
                seen={run_id: at for run_id, at in self._seen.items() if at >= bound},
                open=watched,
            ),
            tuple(sorted(self._finished.values(), key=_end)),
            tuple(sorted(overdue)),
            tuple(surplus),
            error,
        )

    def _due(self) -> dict[str, OpenRun]:
        return {run_id: run for run_id, run in self._open.items() if run.due <= self._now and run_id not in self._met}

    def _take_row(self, row: LogRow) -> None:
        logged_at = _logged_at(row, self._now)
        self._met.add(row_key(row))
        if logged_at <= self._now + MAX_AHEAD:
            self._read_until = max(self._read_until or 0.0, logged_at)
        if isinstance(row, LoggedWorkflowRun):
            self._take_run(row, logged_at)
        elif self._now - logged_at < RECORD_DELAY:
            self._awaited = min(self._awaited, logged_at)

    def _take_run(self, row: LoggedWorkflowRun, logged_at: float) -> None:
        run_id = row.workflow_run_id
        known = self._open.get(run_id)
        is_new = known is None and run_id not in self._seen and logged_at >= self._bound
        self._seen[run_id] = logged_at
        if row.is_over:
            if known is not None or is_new:
                self._finish(run_id, row, row.user, row.triggered_from)
        elif known is not None:
            self._postpone(run_id, known)
        elif is_new or self._is_first:
            created_at = row.created_at.timestamp() if row.created_at else logged_at
            self._postpone(run_id, OpenRun(logged_at, created_at, self._now, row.user, row.triggered_from))

    def _postpone(self, run_id: str, run: OpenRun) -> None:
        due = self._policy.next_look(run.created_at, self._now)
        self._open[run_id] = OpenRun(run.logged_at, run.created_at, due, run.user, run.triggered_from)

    def _finish(
        self, run_id: str, run: LoggedWorkflowRun | WorkflowRun, user: str | None, triggered_from: str | None
    ) -> None:
        self._open.pop(run_id, None)
        self._finished[run_id] = FinishedRun(
            run_id,
            str(run.status),
            user,
            triggered_from,
            run.total_tokens,
            run.elapsed_time,
            run.created_at,
            run.finished_at,
        )


def _logged_at(row: LogRow, now: float) -> float:
    at = time_of(row)
    return now if at is None else at.timestamp()


def _end(run: FinishedRun) -> tuple[float, str]:
    at = run.finished_at or run.created_at
    return (at.timestamp() if at else 0.0, run.workflow_run_id)
