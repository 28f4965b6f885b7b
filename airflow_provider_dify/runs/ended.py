# SPDX-License-Identifier: Apache-2.0
"""
Which workflow runs of an app have ended since the last look, whoever started them. Pure.

Dify has no callback for a run that ends. Its log lists runs by the time of their row, the newest first, and a row costs
the server about 2.5 ms. So a window remembers how far the log was read, and which runs were not over then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Client
from airflow_provider_dify.api.models import (
    RECORD_DELAY,
    LoggedWorkflowRun,
    LogRow,
    WorkflowRun,
    row_key,
    storable,
    time_of,
)
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyRequestError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.runs.log import read_log

# Seconds by which a row may be older than one that was seen before it: a row has the time at which Dify began to write
# it. Rows that are so young are read again at the next look, so a longer time costs requests where runs are many.
OVERLAP = 5.0
# A run that goes on is looked at again after this share of its age.
_SHARE_OF_AGE = 0.05
MAX_DETAIL_INTERVAL = 300.0


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, as an event describes it: without outputs."""

    workflow_run_id: str
    status: str
    user: str | None
    triggered_from: str | None
    total_tokens: int | None
    elapsed_time: float | None
    created_at: datetime | None
    finished_at: datetime | None

    def as_event(self) -> dict[str, Any]:
        """Return the fields as JSON-ready values; times as ISO 8601 text."""
        return {name: storable(value) for name, value in vars(self).items()}


@dataclass(frozen=True)
class OpenRun:
    """A run that was not over when it was last seen. Times are epoch seconds, by Dify's clock but for ``due``."""

    logged_at: float  # when its row was written
    created_at: float  # when the run itself was created
    due: float  # when it is to be looked at again, by this machine's clock
    user: str | None  # who started it, which the run's detail doesn't say
    triggered_from: str | None  # what started it, the same


@dataclass(frozen=True)
class WindowPolicy:
    """How a window moves; times in seconds."""

    poll_interval: float = 30.0
    run_timeout: float = 604_800.0  # since a run's creation; after it the run is no longer watched
    lookback: float = 0.0  # before the first look: runs that have ended since then count, too
    user: str | None = None  # whose runs are read; None for all

    def next_look(self, run_created_at: float, now: float) -> float:
        """Return when to look again at a run that goes on: the older, the later."""
        age = max(0.0, now - run_created_at)
        delay = min(age * _SHARE_OF_AGE, MAX_DETAIL_INTERVAL)
        # The next look comes about then; a moment too early must not make it miss.
        return now if delay <= self.poll_interval else now + delay


@dataclass(frozen=True)
class RunWindow:
    """What is known of an app's runs between two looks: of every user, so that two watchers of an app ask the same."""

    # Epoch seconds of the newest row that was seen, by Dify's clock; None before the first look.
    read_until: float | None = None
    # Rows that will be read again, by the run's id, and the epoch seconds of each.
    seen: Mapping[str, float] = field(default_factory=dict)
    open: Mapping[str, OpenRun] = field(default_factory=dict)  # runs that were not over, by id

    @classmethod
    def read_before(cls, moment: float) -> RunWindow:
        """Return the window to which each run is new whose row is of this moment, in epoch seconds, or later."""
        return cls(read_until=int(moment) + OVERLAP)

    def serialize(self) -> dict[str, Any]:
        """Return the window as JSON-ready values, for :meth:`deserialize`."""
        return {
            "version": 1,
            "read_until": self.read_until,
            "seen": dict(self.seen),
            "open": {run_id: list(vars(run).values()) for run_id, run in self.open.items()},
        }

    @classmethod
    def deserialize(cls, data: object) -> RunWindow:
        """Return the window that :meth:`serialize` described, maybe in another version; a new one for anything else."""
        if not isinstance(data, dict) or data.get("version") != 1:
            return cls()
        try:
            runs = {run_id: OpenRun(*run) for run_id, run in data["open"].items()}
            return cls(data["read_until"], dict(data["seen"]), runs)
        except (AttributeError, KeyError, TypeError):
            return cls()


@dataclass(frozen=True)
class Look:
    """What one look at an app's runs brought, and the window after it."""

    window: RunWindow
    finished: tuple[FinishedRun, ...] = ()  # those that have ended since the last look, the first to end first
    overdue: tuple[str, ...] = ()  # ids of those that are no longer watched, because run_timeout is over
    # Why not every run could be asked for; what the look brought counts all the same.
    error: DifyConnectionError | None = None


PAGE_SIZE = 20
# Pages of the first look: runs that go on then are watched if they are among so many of the newest.
FIRST_PAGES = 3
# A page costs the server as much as about four details.
_RUNS_WORTH_A_PAGE = 4
# Details that one look asks for at most, a second or two of the server's time; the others wait for the next one.
DETAILS_AT_ONCE = 100
# Seconds by which Dify's clock may be ahead of ours. A row from farther ahead, of a clock that was set right since,
# must not hide what comes until then.
MAX_AHEAD = 86_400.0
# Seconds of the log that are read at most after a time without a look, unless run_timeout is longer.
CATCH_UP = 86_400.0


async def look_at_runs(client: Client, window: RunWindow, policy: WindowPolicy, now: float) -> Look:
    """
    Look which of an app's runs have ended, at ``now`` in epoch seconds. The window stays as it is, so that a look that
    fails changes nothing. Raises a DifyError if the log can't be read.
    """
    reader = _Reader(window, policy, now)
    async for rows in read_log(client, user=policy.user, created_after=reader.created_after, size=PAGE_SIZE):
        if not reader.needs_page_after(rows):
            break
    error = None
    for run_id in reader.runs_to_ask_for():
        try:
            run = await client.perform(calls.run_detail(run_id))
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
        self._pages = 0
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
        """Take a page's new rows, and return whether the next page is needed, if there is one."""
        self._pages += 1
        for row in rows:
            self._take_row(row)
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
            self._finish(run.id, run, known)

    def look(self, error: DifyConnectionError | None) -> Look:
        """Return what the look brought."""
        oldest = self._now - self._policy.run_timeout
        overdue = {run_id for run_id, run in self._open.items() if run.created_at < oldest}
        watched = {run_id: run for run_id, run in self._open.items() if run_id not in overdue}
        # Of an app without runs, everything that comes is new.
        read_until = min(self._read_until or 0.0, self._awaited)
        bound = self._bound if self._read_until is None else read_until - OVERLAP
        seen = {run_id: at for run_id, at in self._seen.items() if at >= bound}
        finished = tuple(sorted(self._finished.values(), key=_end))
        return Look(RunWindow(read_until, seen, watched), finished, tuple(sorted(overdue)), error)

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
                self._finish(run_id, row, row)
        elif known is not None:
            self._postpone(run_id, known)
        elif is_new or self._is_first:
            created_at = row.created_at.timestamp() if row.created_at else logged_at
            self._postpone(run_id, OpenRun(logged_at, created_at, self._now, row.user, row.triggered_from))

    def _postpone(self, run_id: str, run: OpenRun) -> None:
        self._open[run_id] = replace(run, due=self._policy.next_look(run.created_at, self._now))

    def _finish(self, run_id: str, run: LoggedWorkflowRun | WorkflowRun, start: OpenRun | LoggedWorkflowRun) -> None:
        self._open.pop(run_id, None)
        self._finished[run_id] = FinishedRun(
            run_id,
            str(run.status),
            start.user,
            start.triggered_from,
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
