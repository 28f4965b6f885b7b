# SPDX-License-Identifier: Apache-2.0
"""Which run a task's try owns: a new one, an earlier try's, or one that has to be looked for."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.providers.common.compat.sdk import conf

from airflow_provider_dify.airflow_versions import CLEARING_DISCARDS_STATE, UI_SECTION, region_of
from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import MAX_USER_LENGTH
from airflow_provider_dify.api.models import WorkflowRun, digest_of, known_fields
from airflow_provider_dify.api.run_stream import NO_EXTRAS, StartExtras
from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.log import CLOCK_TOLERANCE, RunSearch, find_run, fingerprint, until
from airflow_provider_dify.runs.stopping import StopReport, stop_queued, stop_run
from airflow_provider_dify.runs.waiting import WEEK_SECONDS, Deadline, WaitArguments

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

    from airflow_provider_dify.api.client import DifyClient

T = TypeVar("T")

STATE_KEY = "dify_workflow_run"
# What a retry gives Dify's log at least: without it, an earlier try's run would be paid for twice.
SECONDS_FOR_LOG = 120.0

# Version, trace, span, and flags of which the last bit says that the trace is recorded.
_SAMPLED = re.compile(r"00-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f][13579bdf]")


class TaskDefers(Exception):
    """The wait is to go on on the triggerer."""


@dataclass(frozen=True)
class RunArguments:
    """What the operator's arguments say, rendered; each as there, times in seconds."""

    inputs: Mapping[str, Any]
    user: str | None
    workflow_id: str | None
    retries: int
    wait: WaitArguments
    waits: bool = True
    deferrable: bool = False
    defer_after: float = 0.0
    stop_on_failure: bool = True
    restart_lost_runs: bool = False
    extras: StartExtras = NO_EXTRAS
    output_files: str | None = None


@dataclass(frozen=True)
class TaskStart:
    """One start of a task's try, and its run once Dify has named it. Airflow 3.3 and later keep it from try to try."""

    user: str
    search: RunSearch  # what is known of the run until it is named
    try_number: int
    max_tries: int  # the task's; it changes only when the task is cleared
    was_accepted: bool = False  # whether Dify began to respond, so that the run is at least queued
    workflow_run_id: str | None = None  # the run's UUID; None until it is known
    task_id: str | None = None  # what the stop route takes, the same
    stop_was_asked: bool = False  # whether Dify was asked to stop the run, which must not be continued then
    has_ended: bool = False  # whether the run's events said that it failed, although its record says that it goes on
    was_returned: bool = False  # whether the task has got the run's outputs, so that a cleared one starts another run

    def serialize(self) -> dict[str, Any]:
        """Return the start as JSON-ready values, for :meth:`deserialize`."""
        return {**asdict(self), "search": self.search.serialize()}

    @classmethod
    def deserialize(cls, data: Any) -> TaskStart | None:
        """Return the start that :meth:`serialize` described, maybe in another version; ``None`` for anything else."""
        try:
            return cls(**{**known_fields(cls, data), "search": RunSearch.deserialize(data["search"])})
        except (AttributeError, KeyError, TypeError, ValueError):
            return None


class StartMemory:
    """What Airflow remembers of a task's start from try to try; nothing before Airflow 3.3."""

    def __init__(self, context: Mapping[str, Any]) -> None:
        self._store: Any = context.get("task_state_store")
        self._ti: Any = context["ti"]

    @property
    def is_kept(self) -> bool:
        """Whether this Airflow keeps it."""
        return self._store is not None

    def save(self, start: TaskStart | None) -> None:
        """Keep the start of this try; ``None`` for a start that started nothing."""
        if self._store is None:
            return
        if start is None:
            self._store.delete(STATE_KEY)
        else:
            self._store.set(STATE_KEY, start.serialize())

    def mark_returned(self, start: TaskStart) -> None:
        """Say that the task has got the outputs, where what is here may outlive a clear. Never fails the task."""
        if CLEARING_DISCARDS_STATE:
            with contextlib.suppress(Exception):
                self.save(replace(start, was_returned=True))

    def load(self) -> TaskStart | None:
        """Return the last start; ``None`` for none, or if the task was cleared since, and is to start from scratch."""
        start = TaskStart.deserialize(self._store.get(STATE_KEY)) if self._store is not None else None
        max_tries = self._ti.max_tries or 0
        if start is None or start.max_tries == max_tries:
            return start
        # A clear that keeps the state keeps the run. Not all clears of Airflow 3.4.0b2 ask whether to: that of a whole
        # Dag run doesn't, and must not return old outputs.
        is_kept = CLEARING_DISCARDS_STATE and not start.was_returned
        return replace(start, max_tries=max_tries) if is_kept else None


def new_start(
    ti: Any, user: str | None, inputs: Mapping[str, Any], known_runs: tuple[str, ...], now: float
) -> TaskStart:
    """Return the start that a try is about to send at ``now`` (epoch seconds), by its default user or one's own."""
    name = user or default_user(ti, ti.try_number)
    search = RunSearch(name, now, user is None, fingerprint(inputs), known_runs)
    return TaskStart(name, search, ti.try_number, ti.max_tries or 0)


async def find_earlier_start(
    client: DifyClient,
    wait: WaitArguments,
    remembered: TaskStart | None,
    searches: Sequence[TaskStart],
    try_number: int,
) -> tuple[TaskStart, WorkflowRun | None] | None:
    """
    Return the start of this task whose run is to be continued, and the run unless that isn't named yet; ``None`` if a
    new one is to be started. ``remembered`` is what Airflow knows; without that, ``searches`` has what may have been.
    """
    # It may be this try's own. Airflow's scheduler takes a deferred task that resumes at once for dead, and may run the
    # same try from its beginning (seen on 3.3.2).
    if remembered is not None:
        if remembered.stop_was_asked or remembered.has_ended:
            return None
        if remembered.workflow_run_id is None:
            run_id = await find_run(client, remembered.search, patience_seconds=SECONDS_FOR_LOG)
            if run_id is None:
                return remembered, None
            remembered = replace(remembered, workflow_run_id=run_id)
        return await _if_it_can_succeed(client, wait, remembered)
    for start in searches:
        try:
            run_id = await find_run(client, start.search, patience_seconds=SECONDS_FOR_LOG)
        except DifyError as error:
            if start.try_number < try_number or isinstance(error, DifyWorkflowRunUncertain):
                raise
            # That this try has run before is so rare that a log which can't be read is no reason to wait.
            continue
        if run_id is not None:
            found = replace(start, workflow_run_id=run_id, was_accepted=True)
            return await _if_it_can_succeed(client, wait, found)
    return None


async def find_through_failures(
    look: Callable[[], Awaitable[T | None]], wait: WaitArguments, deadline: Deadline, log: Logger
) -> T | None:
    """Return what a look for earlier starts finds, again where it fails as a poll may; without it no run is started."""

    async def look_once() -> list[T | None]:
        # In a list: that there is none is found, too.
        return [await look()]

    def on_failure(error: DifyConnectionError, failures: int) -> None:
        allowed = wait.max_consecutive_failures
        if allowed is None or failures > allowed or deadline.is_over:
            raise DifyConnectionError(
                f"{error} So this try can't tell whether a run of an earlier one still runs, and started none."
            ) from None
        log.warning(
            "The runs of earlier tries could not be looked up, %d in a row of at most %d: %s", failures, allowed, error
        )

    seconds = wait.poll_interval
    found = await until(look_once, deadline, on_failure, interval_seconds=seconds, first_seconds=seconds)
    if found is None:
        raise deadline.error("The runs of earlier tries could not be looked up, and none was started.")
    return found[0]


def lost_start(user: str) -> DifyWorkflowRunUncertain:
    """Return the error for a start that was under way when an earlier try was killed, and whose run is nowhere."""
    return DifyWorkflowRunUncertain(
        f"An earlier try was ended while its start was under way, and Dify's log does not show a run of user "
        f"{user!r}: it may be queued, and run later. Look for the user in the app's log in Dify's console, then clear "
        "the task to start a new run.",
        user=user,
    )


async def _if_it_can_succeed(
    client: DifyClient, wait: WaitArguments, start: TaskStart
) -> tuple[TaskStart, WorkflowRun | None] | None:
    look = calls.run_detail(str(start.workflow_run_id))
    try:
        try:
            run = await client.perform(look)
        except DifyWorkflowRunNotFound:
            # A run is given up, and another one paid for, only after Dify has said so twice.
            await asyncio.sleep(wait.poll_interval)
            run = await client.perform(look)
    except DifyWorkflowRunNotFound:
        return None
    return None if wait.judge(run).is_failure else (start, run)


def starts_of_earlier_tries(context: Mapping[str, Any], arguments: RunArguments) -> Iterator[TaskStart]:
    """Return what to look for in Dify's log where Airflow remembers nothing, the last try first."""
    ti: Any = context["ti"]
    max_tries = ti.max_tries or 0
    first_try = first_try_number(ti, arguments.retries)
    not_before = earliest_start(context)
    prints = fingerprint(arguments.inputs)
    if arguments.user is not None:
        if ti.try_number > first_try:
            # It names no try, so the inputs have to tell the runs apart.
            not_before += CLOCK_TOLERANCE.total_seconds()
            search = RunSearch(arguments.user, not_before, False, prints, skips_failed=True)
            yield TaskStart(search.user, search, ti.try_number - 1, max_tries)
        return
    # This try's own start is remembered, from Airflow 3.3 on.
    newest = ti.try_number - 1 if StartMemory(context).is_kept else ti.try_number
    for number in range(newest, first_try - 1, -1):
        search = RunSearch(default_user(ti, number), not_before, True, prints, skips_failed=True)
        yield TaskStart(search.user, search, number, max_tries)


def first_try_number(ti: Any, retries: int) -> int:
    """
    Return the number of a task's first try since it was cleared: its tries go on counting then, but what came before
    was to be done again.
    """
    number = int(ti.max_tries or 0) - retries + 1
    # More is impossible, unless `retries` was lowered since: then nothing tells which try was the first.
    return number if number <= ti.try_number else 1


def earliest_start(context: Mapping[str, Any]) -> float:
    """
    Return the epoch seconds at which a run of this task can have been started at the earliest. A run from before the
    Dag run is an older one's, or another Airflow's.
    """
    began = getattr(context.get("dag_run"), "start_date", None)
    if isinstance(began, datetime):
        return began.timestamp()
    return time.time() - WEEK_SECONDS


async def stop_start(client: DifyClient, start: TaskStart) -> StopReport:
    """Stop the run of a start; one that Dify has not named yet is looked for in its log first. Raises no DifyError."""
    if start.workflow_run_id is None:
        return await stop_queued(client, start.search, start.task_id)
    return await stop_run(client, start.workflow_run_id, start.task_id, start.user)


def traceparent_of(ti: Any) -> str | None:
    """
    Return the W3C trace context of a task that Airflow traces, else ``None``. Airflow 3.2 and later make one for each
    task, also without ``[traces] otel_on``; 3.3 marks what its sampler leaves out.
    """
    carrier = getattr(ti, "context_carrier", None)
    value = carrier.get("traceparent") if isinstance(carrier, dict) else None
    is_sampled = isinstance(value, str) and _SAMPLED.fullmatch(value) is not None
    return value if is_sampled and conf.getboolean("traces", "otel_on", fallback=False) else None


def installation_id() -> str:
    """
    Return 8 hexadecimal digits for this Airflow installation, the same on all of its machines: two Airflows that start
    runs of the same Dify app, with the same Dags, must not take each other's runs. They are made of ``[core]
    fernet_key`` and ``[api] base_url`` (Airflow 2: ``[webserver]``), and neither can be recovered from them.
    """
    # Airflow 3 warns of the old name each time that it is read.
    settings = (("core", "fernet_key"), (UI_SECTION, "base_url"))
    text = "\n".join(str(conf.get(section, key, fallback="")) for section, key in settings)
    return digest_of(text, 8)


def default_user(ti: Any, try_number: int) -> str:
    """
    Return the ``user`` who starts the run of a try, the same whenever it is asked for.

    :param ti: the task instance.
    :param try_number: the try.
    :return: ``airflow/<installation>/<Dag>/<task>[<map index>]/<Dag run>/<try>``, of at most 255 characters, which
        Dify's log shows and can be searched for. From Airflow 3.4 on, a digest of the map's or loop's execution follows
        the index.
    """
    return shorten_user(f"{task_name(ti)}/{try_number}", MAX_USER_LENGTH)


def task_name(ti: Any) -> str:
    """Return the name of a task instance: ``airflow/<installation>/<Dag>/<task>[<map index>]/<Dag run>``, uncut."""
    index, region = region_of(ti)
    place = f"{index}~{digest_of(region, 8)}" if region else index
    return f"airflow/{installation_id()}/{ti.dag_id}/{ti.task_id}{f'[{place}]' if index >= 0 else ''}/{ti.run_id}"


def shorten_user(user: str, limit: int) -> str:
    """Return a name cut to so many characters (more than 17), with a digest of the whole in place of its end."""
    if len(user) <= limit:
        return user
    return f"{user[: limit - 17]}~{digest_of(user)}"
