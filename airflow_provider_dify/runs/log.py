"""How an app's log is read: page by page without missing a row, again through failures, and for a run of ours."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call, Steps
from airflow_provider_dify.api.models import (
    LoggedWorkflowRun,
    LogRow,
    RowWithoutRun,
    WorkflowRun,
    WorkflowRunStatus,
    is_deleted,
    is_server_from,
    known_fields,
    runs_of,
    time_of,
)
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain
from airflow_provider_dify.runs.clock import TaskClock
from airflow_provider_dify.runs.fingerprint import fits
from airflow_provider_dify.runs.waiting import delay_after

if TYPE_CHECKING:
    from airflow.sdk.types import Logger


# The largest page that Dify returns.
_MAX_SIZE = 100


@dataclass(frozen=True)
class LogPage:
    """
    A page of the log, the newest rows first.

    Dify sorts the log by whole seconds. Rows of one second come in any order, and in another one on each page. So a
    page by its number may leave out a row of the second with which the page before ended, and repeat another one. So
    each page begins with the last second of the page before instead: rows may come twice, and none is missed. What can
    still be missed is a row of a second that has more than 100.

    :param size: rows that are asked for.
    :param number: the page's number, from 1.
    :param created_before: the newest second of the page; ``None`` for the log's beginning.
    :param next_size: rows of the next page.
    :param is_filtered: whether the server is known to filter by time, or may.
    """

    size: int
    number: int = 1
    created_before: datetime | None = None
    next_size: int | None = None
    is_filtered: bool = True

    def request(
        self, *, user: str | None = None, created_after: datetime | None = None, patience: float = 0.0
    ) -> Call[list[LogRow]]:
        """
        Return the request for the page.

        :param user: whose runs; everybody's by default.
        :param created_after: the oldest second of the rows.
        :param patience: seconds that the server gets for the page at least.
        """
        return calls.logged_runs(
            user=user,
            created_after=created_after,
            created_before=self.created_before,
            page=self.number,
            limit=self.size,
            patience=patience,
        )

    def after(self, rows: Sequence[LogRow], *, not_before: datetime | None = None) -> LogPage | None:
        """
        Return the next page.

        :param rows: the rows of this one.
        :param not_before: when the oldest run that is wanted was created, for a server that knows no such filter.
        :return: the page after it; ``None`` at the log's end, or where older runs begin.
        """
        if len(rows) < self.size:
            return None
        began = next((run.created_at for run in reversed(runs_of(rows))), None)
        if not_before is not None and began is not None and began < not_before:
            return None
        newest, oldest = time_of(rows[0]), time_of(rows[-1])
        before = self.created_before
        if not self.is_filtered or newest is None or oldest is None or (before is not None and newest > before):
            # A server that knows no such filter, or tells no time.
            return replace(self, number=self.number + 1, created_before=None, is_filtered=False)
        size = self.next_size or self.size
        if oldest < newest:
            return LogPage(size, created_before=oldest)
        if self.size < _MAX_SIZE:
            # All of one second, so that the next page would begin with the same rows.
            return LogPage(_MAX_SIZE, created_before=oldest, next_size=size)
        return replace(self, number=self.number + 1)


T = TypeVar("T")

# Seconds after the first failure; doubled with each further one.
RETRY_DELAY = 1.0


@dataclass(frozen=True)
class RepeatedLook:
    """
    A look into Dify's log that is repeated.

    :param clock: the task's deadline.
    :param log: the task's log.
    :param poll_interval: seconds between polls of a run.
    """

    clock: TaskClock
    log: Logger
    poll_interval: float

    def through_failures(self, look: Callable[[], Steps[T]], max_failures: int) -> Steps[T]:
        """
        Look once, and again where that fails as a poll may: that Dify is away is no reason to give a run up.

        :param look: the look.
        :param max_failures: how often in a row it may fail.
        :return: what the look returns.
        :raises DifyConnectionError: if it fails more often, or when the deadline is over.
        :raises DifyError: as the look does.
        """
        failures = 0
        while True:
            try:
                return (yield from look())
            except DifyConnectionError as error:
                failures += 1
                if failures > max_failures or self.clock.is_over:
                    raise
                self.log.warning(
                    "The runs of earlier tries could not be looked up, %d in a row of at most %d: %s",
                    failures,
                    max_failures,
                    error,
                )
                delay = max(self.poll_interval, delay_after(error, failures, RETRY_DELAY))
            yield from self.clock.pause(delay)

    def until_found(
        self, look: Callable[[], Steps[T | None]], seconds_left: Callable[[bool], float]
    ) -> Steps[T | None]:
        """
        Look until something is there: often at first, and then as often as a run is polled.

        :param look: the look, which returns ``None`` for nothing.
        :param seconds_left: returns how long to go on; it is given whether the last look failed.
        :return: what the look returns; ``None`` if the time is over.
        :raises DifyError: as the look does, but no :class:`DifyConnectionError`.
        """
        interval = min(1.0, self.poll_interval)
        while True:
            has_failed = False
            found: T | None = None
            try:
                found = yield from look()
            except DifyConnectionError as failure:
                # Let out, it would have Airflow retry, and the retry start another run.
                self.log.warning("Dify's log could not be read; looking again: %s", failure)
                has_failed = True
            if found is not None:
                return found
            left = seconds_left(has_failed)
            if left <= 0 or self.clock.is_over:
                return None
            yield from self.clock.pause(min(interval, left))
            interval = min(interval * 2, max(self.poll_interval, 1.0))


# How far Dify's clock may be behind ours for a run to count as started after the start was sent.
CLOCK_TOLERANCE = timedelta(seconds=60)
# A row costs the server about 2.5 ms; a user's runs of the last minutes are few as a rule, and hundreds if many tasks
# share a user.
_PAGE_SIZE = 20
_NEXT_PAGE_SIZE = 100
_MAX_ROWS = 1000


@dataclass(frozen=True)
class RunSearch:
    """
    What is known of a run that was not named. It travels in a serialized trigger, so it holds no inputs.

    :param user: the ``user`` of the start.
    :param sent_at: epoch seconds of the start, by this machine's clock.
    :param user_is_unique: whether the user names one try of one task, so that each run of it is ours.
    :param fingerprint: of the start's inputs, from :func:`~airflow_provider_dify.runs.fingerprint.fingerprint`.
    :param known_runs: ids of the user's runs from before the start.
    :param skips_failed: whether a run that failed or was stopped is of no interest.
    """

    user: str
    sent_at: float
    user_is_unique: bool
    fingerprint: dict[str, str] = field(default_factory=dict)
    known_runs: tuple[str, ...] = ()
    skips_failed: bool = False

    def serialize(self) -> dict[str, Any]:
        """Return the search as JSON-ready values, for :meth:`deserialize`."""
        return {**asdict(self), "known_runs": list(self.known_runs)}

    @classmethod
    def deserialize(cls, data: Mapping[str, Any]) -> RunSearch:
        """Return the search that :meth:`serialize` described, maybe in another version of this package."""
        known = {"sent_at": 0.0, "user_is_unique": False, **known_fields(cls, data)}
        return cls(**{**known, "known_runs": tuple(data.get("known_runs") or ())})

    @property
    def not_before(self) -> datetime:
        """The earliest time, by Dify's clock, at which the run can have been created."""
        return datetime.fromtimestamp(self.sent_at, timezone.utc) - CLOCK_TOLERANCE

    def is_candidate(self, run: LoggedWorkflowRun) -> bool:
        """
        Return whether a row of the log may be the run.

        Compared here too, because a server may ignore what it was asked to filter by.
        """
        return (
            run.user == self.user
            and run.workflow_run_id not in self.known_runs
            and not (self.skips_failed and run.status in (WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED))
            and (run.created_at is None or run.created_at >= self.not_before)
        )


def find_run(search: RunSearch, others: set[str] | None = None, *, patience: float = 0.0) -> Steps[str | None]:
    """
    Look for the run of a start in Dify's log.

    :param search: what is known of it.
    :param others: ids of runs that were started with other inputs; a look adds those that it meets, and the next one
        does not ask for them again.
    :param patience: seconds that the server gets for a page at least: its log may be slow.
    :return: the run's id; ``None`` if no run fits yet: it may be queued.
    :raises DifyWorkflowRunUncertain: if several fit, one can't be compared, or there are more runs than are read.
    :raises DifyError: if the log can't be read.
    """
    others = set() if others is None else others
    candidates, are_all = yield from user_runs(search, patience)
    fitting = []
    for run in candidates:
        if run.workflow_run_id in others:
            continue
        if search.user_is_unique:
            fitting.append(run.workflow_run_id)
            continue
        detail: WorkflowRun = yield calls.run_detail(run.workflow_run_id)
        is_equal = fits(search.fingerprint, detail.inputs or {})
        if is_equal is None:
            raise _uncertain(search, f"{run.workflow_run_id} has no inputs that could be compared")
        if is_equal:
            fitting.append(run.workflow_run_id)
        else:
            others.add(run.workflow_run_id)
    if len(fitting) > 1:
        raise _uncertain(search, f"{', '.join(fitting)} may each be it")
    if not are_all and not (fitting and search.user_is_unique):
        raise _uncertain(search, f"more than {_MAX_ROWS:,} runs have been started since")
    return fitting[0] if fitting else None


def known_runs(user: str) -> Steps[tuple[str, ...]]:
    """
    Return a user's newest runs, before a start: they are none of its own.

    :return: their ids; none where the log can't be read.
    """
    try:
        rows: list[LogRow] = yield calls.logged_runs(user=user, limit=_PAGE_SIZE)
    except DifyError:
        return ()
    return tuple(run.workflow_run_id for run in runs_of(rows) if run.user == user)


def runs_queue(server_version: str | None) -> bool:
    """
    Return whether a server lets runs wait before they have a record: 1.13 and later do, on Celery workers.

    :param server_version: Dify's version; one that isn't known may be new.
    """
    return is_server_from(server_version, (1, 13)) is not False


def user_runs(search: RunSearch, patience: float) -> Steps[tuple[list[LoggedWorkflowRun], bool]]:
    """Return the runs of a user that may be the one that is searched, and whether these are all that there are."""
    found: list[LoggedWorkflowRun] = []
    number_of_rows = 0
    page: LogPage | None = LogPage(_PAGE_SIZE, next_size=_NEXT_PAGE_SIZE)
    while page is not None and number_of_rows < _MAX_ROWS:
        rows: list[LogRow] = yield page.request(user=search.user, created_after=search.not_before, patience=patience)
        for row in rows:
            is_ours = row.user == search.user
            if is_ours and isinstance(row, RowWithoutRun) and not is_deleted(row, time.time()):
                raise without_record(f"a run of user {search.user!r}")
        found += [run for run in runs_of(rows) if search.is_candidate(run)]
        number_of_rows += len(rows)
        page = page.after(rows, not_before=search.not_before)
    # Two pages may show a row twice.
    return list({run.workflow_run_id: run for run in found}.values()), page is None


def without_record(what: str) -> DifyConnectionError:
    """
    Return the error for a row of the log that may be ours, and whose run can't be known yet.

    :param what: the run, in the middle of a sentence.
    """
    return DifyConnectionError(f"Dify's log has no record yet of {what}: a worker of Dify writes it. This may pass.")


def _uncertain(search: RunSearch, why: str) -> DifyWorkflowRunUncertain:
    return DifyWorkflowRunUncertain(
        f"The start named no run, and Dify's log of user {search.user!r} does not tell which run it started: {why}. "
        "Look at these runs in Dify's console, then clear the task to start a new run.",
        user=search.user,
    )
