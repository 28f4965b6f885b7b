# SPDX-License-Identifier: Apache-2.0
"""How an app's log is read: without missing a row, again through failures, and for a run of ours."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Client
from airflow_provider_dify.api.models import (
    BAD_STATUSES,
    LoggedWorkflowRun,
    LogRow,
    RowWithoutRun,
    digest_of,
    known_fields,
    row_key,
    runs_of,
    time_of,
)
from airflow_provider_dify.exceptions import (
    MAX_RETRY_DELAY,
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.files import DifyFile
from airflow_provider_dify.runs.waiting import Deadline

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

T = TypeVar("T")

# What Dify reads as true and false for a checkbox: 1.12.1 to 1.16.1, base_app_generator, _validate_inputs.
_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
# Seen on Dify 1.12.1, 1.13.0, 1.14.2 and 1.16.1: whole numbers out of this range become floats.
_WHOLE = range(-(2**63), 2**64)


def fingerprint(inputs: Mapping[str, Any]) -> dict[str, str]:
    """Return 8 hexadecimal digits for the name of each input whose value is plain: text, number, true or false."""
    return {
        name: _digest(name, text)
        for name, value in inputs.items()
        # Dify drops these and puts its own entries of the same name into a run's inputs.
        if isinstance(name, str) and not name.startswith("sys.") and (text := _normalize(value)) is not None
    }


def fits(sent: Mapping[str, str], run_inputs: Mapping[str, Any]) -> bool | None:
    """
    Return whether a run may have been started with the inputs of a fingerprint; ``None`` if nothing can be compared.
    Only what both sides have is compared: Dify drops what the form doesn't know, adds defaults and ``sys.*`` entries,
    and turns blank numbers into ``null``.
    """
    found = fingerprint(run_inputs)
    common = sent.keys() & found.keys()
    return all(sent[name] == found[name] for name in common) if common else None


def _digest(name: str, text: str) -> str:
    # With the name in it, equal values of two inputs don't show as equal.
    return digest_of(f"{name}\0{text}", 8)


def _normalize(value: Any) -> str | None:
    """
    Return one text for all that Dify may make of a value, whatever the kind of its field; ``None`` if it isn't
    compared. Dify 1.12.1 to 1.16.1, ``base_app_generator``: a number field makes numbers of texts, a checkbox true and
    false of texts and numbers, and every field removes NUL characters. A file is its name and size, on both sides.
    """
    if not isinstance(value, (str, int, float)):
        return _normalize_files(value)
    if isinstance(value, str):
        value = value.replace("\0", "")
        word = value.strip().lower()
        if word in _TRUE | _FALSE:
            return "true" if word in _TRUE else "false"
        number = parse_number(value)
        if number is None:
            return f"text {value}"
        value = number
    if value in (0, 1):
        return "true" if value else "false"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and value in _WHOLE:
        return f"number {value}"
    try:
        return f"number {float(value)!r}" if math.isfinite(value) else None
    except OverflowError:
        return None


def _normalize_files(value: Any) -> str | None:
    known: list[tuple[Any, Any]] = []
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, DifyFile):
            known.append((item.file_name, item.size))
        elif isinstance(item, dict) and item.get("dify_model_identity") == "__dify__file__":
            known.append((item.get("filename"), item.get("size")))
    whole = len(known) == (len(value) if isinstance(value, list) else 1) > 0
    return f"files {known}" if whole and all(isinstance(size, int) for _, size in known) else None


def parse_number(text: str) -> int | float | None:
    """Return what a text is for Dify's number fields, a ``float`` only with a point; ``None`` for no number."""
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return None


# The largest page that Dify returns.
_MAX_SIZE = 100
# Pages without anything new after which a server counts as one that shows the same page again and again.
_MAX_STALE_PAGES = 3
# Seconds after the first failure; doubled with each further one.
RETRY_DELAY = 1.0


async def read_log(
    client: Client,
    *,
    user: str | None = None,
    created_after: datetime | None = None,
    not_before: datetime | None = None,
    size: int = 20,
    next_size: int | None = None,
    patience_seconds: float = 0.0,
) -> AsyncIterator[list[LogRow]]:
    """
    Iterate over pages of the log, the newest rows first, each row once. ``created_after`` is the server's filter;
    ``not_before`` ends the reading on a server that knows none. ``next_size`` is for the pages after the first one.
    """
    seen: set[str] = set()
    stale_pages = 0
    page: _LogPage | None = _LogPage(size, next_size=next_size)
    while page is not None and stale_pages < _MAX_STALE_PAGES:
        rows = await client.perform(
            calls.logged_runs(
                user=user,
                created_after=created_after,
                created_before=page.created_before,
                page=page.number,
                limit=page.size,
                patience_seconds=patience_seconds,
            )
        )
        new = {row_key(row): row for row in rows if row_key(row) not in seen}
        seen |= new.keys()
        stale_pages = 0 if new else stale_pages + 1
        if new:
            yield list(new.values())
        page = page.after(rows, not_before)


@dataclass(frozen=True)
class _LogPage:
    """
    A page of the log.

    Dify sorts the log by whole seconds. Rows of one second come in any order, and in another one on each page. So a
    page by its number may leave out a row of the second with which the page before ended, and repeat another one. So
    each page begins with the last second of the page before instead: rows may come twice, and none is missed. What can
    still be missed is a row of a second that has more than 100.
    """

    size: int
    number: int = 1
    created_before: datetime | None = None  # the newest second of the page; None for the log's beginning
    next_size: int | None = None
    is_filtered: bool = True  # whether the server is known to filter by time, or may

    def after(self, rows: Sequence[LogRow], not_before: datetime | None) -> _LogPage | None:
        """Return the page after this one, whose rows these are; ``None`` at the log's end, or where older rows are."""
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
            return _LogPage(size, created_before=oldest)
        if self.size < _MAX_SIZE:
            # All of one second, so that the next page would begin with the same rows.
            return _LogPage(_MAX_SIZE, created_before=oldest, next_size=size)
        return replace(self, number=self.number + 1)


def delay_after(error: Exception, failures: int, retry_delay: float) -> float:
    """
    Return for how many seconds not to ask after a failure: doubled from ``retry_delay`` on with each in a row, with
    jitter, so that short intervals don't use up the allowance at once. A ``Retry-After`` is never cut short.
    """
    if not isinstance(error, DifyConnectionError):
        return 0.0
    delay = retry_delay * 2.0 ** (min(failures, 16) - 1) * random.uniform(1, 1.5)  # noqa: S311
    return max(min(delay, MAX_RETRY_DELAY), error.retry_after or 0.0)


async def until(
    look: Callable[[], Awaitable[T | None]],
    deadline: Deadline,
    on_failure: Callable[[DifyConnectionError, int], None],
    *,
    interval_seconds: float,
    first_seconds: float | None = None,
    seconds_left: Callable[[bool], float] | None = None,
) -> T | None:
    """
    Repeat a look until it brings something; ``None`` if the time is over. The pauses grow from ``first_seconds`` (one,
    by default) to the interval. ``on_failure`` gets each error with the number of failures in a row, and raises what
    ends the looking. ``seconds_left`` gets whether the last look failed, and returns how long to go on, if not until
    the deadline.
    """
    pause = min(1.0, interval_seconds) if first_seconds is None else first_seconds
    failures = 0
    while True:
        found: T | None = None
        delay = 0.0
        try:
            found = await look()
            failures = 0
        except DifyConnectionError as error:
            failures += 1
            on_failure(error, failures)
            delay = delay_after(error, failures, RETRY_DELAY)
        if found is not None:
            return found
        left = deadline.left if seconds_left is None else min(deadline.left, seconds_left(failures > 0))
        if left <= 0:
            return None
        await asyncio.sleep(min(max(pause, delay), left))
        pause = min(pause * 2, max(interval_seconds, 1.0))


def looking_again(log: Logger, max_failures: int | None = None) -> Callable[[DifyConnectionError, int], None]:
    """Return what :func:`until` does with a look into Dify's log that failed: a line, up to so many in a row."""

    def on_failure(error: DifyConnectionError, failures: int) -> None:
        if max_failures is not None and failures > max_failures:
            raise error
        log.warning("Dify's log could not be read; looking again: %s", error)

    return on_failure


# How far Dify's clock may be behind ours for a run to count as started after the start was sent.
CLOCK_TOLERANCE = timedelta(seconds=60)
# A row costs the server about 2.5 ms; a user's runs of the last minutes are few as a rule, and hundreds if many tasks
# share a user.
_PAGE_SIZE = 20
_NEXT_PAGE_SIZE = 100
_MAX_ROWS = 1000


@dataclass(frozen=True)
class RunSearch:
    """What is known of a run that was not named. It travels in a serialized trigger, so it holds no inputs."""

    user: str  # of the start
    sent_at: float  # epoch seconds of the start, by this machine's clock
    user_is_unique: bool  # whether the user names one try of one task, so that each run of it is ours
    fingerprint: dict[str, str] = field(default_factory=dict)  # of the start's inputs
    known_runs: tuple[str, ...] = ()  # ids of the user's runs from before the start
    skips_failed: bool = False  # whether a run that failed or was stopped is of no interest
    announced_id: str = ""  # the run's UUID, where the response to the start named it

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
        """Return whether a row of the log may be the run; a server may ignore what it was asked to filter by."""
        return (
            run.user == self.user
            and run.workflow_run_id not in self.known_runs
            and not (self.skips_failed and run.status in BAD_STATUSES)
            and (run.created_at is None or run.created_at >= self.not_before)
        )


async def find_run(
    client: Client, search: RunSearch, others: set[str] | None = None, *, patience_seconds: float = 0.0
) -> str | None:
    """
    Look once for the run of a start in Dify's log, and return its id; ``None`` if no run fits yet: it may be queued.
    Runs that were started with other inputs go into ``others``, and are not asked for again. Raises a
    DifyWorkflowRunUncertain if several runs fit, one can't be compared, or there are too many.
    """
    if search.announced_id:
        try:
            await client.perform(calls.run_detail(search.announced_id))
        except DifyWorkflowRunNotFound:
            return None
        return search.announced_id
    others = set() if others is None else others
    candidates, are_all = await user_runs(client, search, patience_seconds=patience_seconds)
    fitting = []
    for run in candidates:
        if run.workflow_run_id in others:
            continue
        if search.user_is_unique:
            fitting.append(run.workflow_run_id)
            continue
        detail = await client.perform(calls.run_detail(run.workflow_run_id))
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


async def before_start(client: Client, user: str | None) -> tuple[tuple[str, ...], float]:
    """
    Return the ids of a user's newest runs before a start (none of a default user, ``None``), and what counts as the
    start's time, in epoch seconds. Where the log can't be read, no earlier run may fit: there the clocks get no
    tolerance.
    """
    if user is None:
        return (), time.time()
    try:
        rows = await client.perform(calls.logged_runs(user=user, limit=_PAGE_SIZE))
    except DifyError:
        return (), time.time() + CLOCK_TOLERANCE.total_seconds()
    return tuple(run.workflow_run_id for run in runs_of(rows) if run.user == user), time.time()


async def user_runs(
    client: Client, search: RunSearch, *, patience_seconds: float = 0.0
) -> tuple[list[LoggedWorkflowRun], bool]:
    """Return the runs of a user that may be the one that is searched, and whether these are all that there are."""
    found: list[LoggedWorkflowRun] = []
    number_of_rows = 0
    pages = read_log(
        client,
        user=search.user,
        created_after=search.not_before,
        not_before=search.not_before,
        size=_PAGE_SIZE,
        next_size=_NEXT_PAGE_SIZE,
        patience_seconds=patience_seconds,
    )
    async for rows in pages:
        if number_of_rows >= _MAX_ROWS:
            return found, False
        for row in rows:
            if isinstance(row, RowWithoutRun) and row.user == search.user and row.may_get_record(time.time()):
                raise DifyConnectionError(
                    f"Dify's log has no record yet of a run of user {search.user!r}: a worker of Dify writes it. This "
                    "may pass."
                )
        found += [run for run in runs_of(rows) if search.is_candidate(run)]
        number_of_rows += len(rows)
    return found, True


def _uncertain(search: RunSearch, why: str) -> DifyWorkflowRunUncertain:
    return DifyWorkflowRunUncertain(
        f"The start named no run, and Dify's log of user {search.user!r} does not tell which run it started: {why}. "
        "Look at these runs in Dify's console, then clear the task to start a new run.",
        user=search.user,
    )
