"""One row of a batch on the event loop: its place, its start, its run, and its retries."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from airflow_provider_dify.api.async_run_stream import AsyncWorkflowRunStream
from airflow_provider_dify.api.calls import Pause, SendStart, Step, Steps, run_steps_async
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.batch.naming import RowUsers
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.batch.resuming import MOST_LOOKS, Resumption, RowPlan
from airflow_provider_dify.batch.row_follower import PlaceAgain, RowFollower, RowLog, dify_responds
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunFailed,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.clock import TaskClock
from airflow_provider_dify.runs.log import RepeatedLook, RunSearch
from airflow_provider_dify.runs.stopping import stop_run
from airflow_provider_dify.runs.verdict import Outcome, Verdict
from airflow_provider_dify.runs.waiting import RunWait, WaitPolicy, delay_after
from airflow_provider_dify.runs.whole_run import name_run, named_stream

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

    from airflow_provider_dify.hooks.dify_async import DifyAsyncHook

# Seconds before a run that failed is started again; doubled with each further failure.
RETRY_DELAY = 1.0
# Seconds without a name after which an accepted start shows that Dify's queue is not empty.
_SECONDS_BEFORE_QUEUED = 5.0


class NoMoreStarts(Exception):
    """The batch starts nothing any more: it is killed, its time is over, or too many rows have failed."""


@dataclass(frozen=True)
class RowSettings:
    """What the operator's arguments say about each run; times in seconds."""

    workflow_id: str | None
    run_retries: int
    fail_on_partial_success: bool
    timeout: float
    run_timeout: float | None
    poll_interval: float
    not_found_grace: float
    max_consecutive_failures: int
    restart_lost_runs: bool = False

    @property
    def policy(self) -> WaitPolicy:
        """What the wait on each run survives."""
        return WaitPolicy(
            fail_on_partial_success=self.fail_on_partial_success,
            not_found_grace=self.not_found_grace,
            run_timeout=self.run_timeout,
            max_consecutive_failures=self.max_consecutive_failures,
        )


class Places(Protocol):
    """Where a row gets its place among the runs at once, and what it has to know of the others."""

    @property
    def starts_more(self) -> bool:
        """Whether runs are still to be started."""

    @property
    def has_queued_runs(self) -> bool:
        """Whether a start that Dify has accepted has no run yet."""

    async def take_place(self, row: int) -> None:
        """Wait for a place; the first row first."""

    async def on_refused(self, row: int, sent_at: float, error: DifyConnectionError) -> None:
        """Give the place back, because Dify has too many runs, and wait for another one."""

    def on_started(self, app_id: str | None) -> None:
        """Take note that Dify took a start, for a run of this app."""

    def has_started_since(self, moment: float) -> bool:
        """Return whether Dify has taken a start of any row since a moment of ``time.monotonic``."""


@dataclass(frozen=True)
class BatchClient:
    """What all rows of a batch share."""

    hook: DifyAsyncHook
    clock: TaskClock
    users: RowUsers
    resumption: Resumption
    settings: RowSettings
    places: Places
    log: Logger
    looks: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MOST_LOOKS))


@dataclass(frozen=True)
class _Outcome:
    """What became of one run of a row, or of a start that has none."""

    status: str
    error: str | None = None
    run: WorkflowRun | None = None
    run_id: str | None = None
    can_be_repeated: bool = False
    # Whether it counts among the row's attempts.
    was_started: bool = True


@dataclass(frozen=True)
class LostStart:
    """
    A start that went out, and whose run was not found: it may run, and be paid for.

    :param error: why no id came back.
    :param search: what is known of the run.
    :param attempt: the row's attempt, from 0.
    """

    error: DifyWorkflowRunUncertain
    search: RunSearch
    attempt: int


class RowRun:
    """
    One row of a batch.

    :param client: what all rows share.
    :param row: the row's number.
    :param inputs: its inputs, checked.
    :param may_be_started: whether an earlier try may have started it, so that it is looked for first.
    :ivar workflow_run_id: its run that is under way; ``None`` until that is known.
    :ivar task_id: what the stop route takes; ``None`` until it is known.
    :ivar user: who started it.
    :ivar lost: its last start, if that got lost.
    """

    def __init__(self, client: BatchClient, row: int, inputs: Mapping[str, Any], *, may_be_started: bool) -> None:
        self.row = row
        self._client = client
        self._inputs = inputs
        self.may_be_started = may_be_started
        self._plan = RowPlan()
        self._log: Any = RowLog(row, client.log)
        self._follower: RowFollower | None = None
        self._found_run_id: str | None = None
        self._sent_at = 0.0
        self.user = ""
        self.lost: LostStart | None = None

    @property
    def workflow_run_id(self) -> str | None:
        stream = self._follower.stream if self._follower is not None else None
        return stream.workflow_run_id if stream is not None and stream.is_named else self._found_run_id

    @property
    def task_id(self) -> str | None:
        stream = self._follower.stream if self._follower is not None else None
        return stream.task_id if stream is not None and stream.is_named else None

    @property
    def is_starting(self) -> bool:
        """Whether a start is under way whose run has no name yet."""
        return self._follower is not None and self._follower.stream is not None and self.workflow_run_id is None

    @property
    def is_queued(self) -> bool:
        """Whether Dify has accepted the start some time ago, and named no run yet."""
        stream = self._follower.stream if self._follower is not None else None
        is_unnamed = stream is not None and stream.is_accepted and self.workflow_run_id is None
        return is_unnamed and time.monotonic() - self._sent_at > _SECONDS_BEFORE_QUEUED

    async def run(self) -> RowResult:
        """
        Run the row to its end.

        :return: its result, of the last run.
        :raises NoMoreStarts: if the batch ends before its first start.
        :raises DifyWorkflowRunUncertain: if a start got lost, and its run was not found: it may run, and be paid for.
        :raises DifyConnectionError: if Dify can't be reached, which says nothing about the row.
        :raises DifyAuthenticationError: if the key is refused.
        :raises DifyWorkflowRunTimeout: if the batch's time is over.
        """
        client = self._client
        if self.may_be_started:
            self._plan = await self._find()
            self.may_be_started = False
            await client.places.take_place(self.row)
        outcome: _Outcome | None = None
        while True:
            plan = self._plan
            if plan.workflow_run_id is not None:
                self.user = client.users.user_of(self.row, plan.attempt)
                outcome = await self._follow(self._new_follower(), plan.workflow_run_id)
            else:
                try:
                    outcome = await self._start(plan.attempt)
                except NoMoreStarts:
                    if outcome is None:
                        raise
                    self._raise_if_lost()
                    return self._result(outcome, plan.attempt)
            if (
                not outcome.can_be_repeated
                or plan.failures >= client.settings.run_retries
                or not client.places.starts_more
            ):
                self._raise_if_lost()
                return self._result(outcome, plan.attempt + 1 if outcome.was_started else plan.attempt)
            self._plan = RowPlan(plan.attempt + 1, plan.failures + 1)
            delay = delay_after(DifyConnectionError(), plan.failures + 1, RETRY_DELAY)
            self._log.warning(
                "%s failed and is started again in %.1f seconds, retry %d of %d: %s",
                f"run {outcome.run_id}" if outcome.run_id else "its start",
                delay,
                plan.failures + 1,
                client.settings.run_retries,
                outcome.error,
            )
            await asyncio.sleep(delay)

    async def run_if_found(self) -> RowResult:
        """
        Look once more for the run of a start that got lost, and follow it if it came up.

        :return: the row's result; :meth:`lost_result` if there is still none.
        :raises DifyError: as :meth:`run` does.
        """
        lost = self.lost
        assert lost is not None  # noqa: S101
        follower = self._new_follower()
        # Once; only a look that failed is repeated.
        grace = self._client.settings.not_found_grace
        try:
            run_id: str | None = await self._take(follower.search_run(lost.search, lost.error, 0.0, grace))
        except DifyWorkflowRunUncertain as error:
            run_id, self.lost = None, replace(lost, error=error)
        if run_id is None:
            return self.lost_result()
        self.lost = None
        self._plan = replace(self._plan, attempt=lost.attempt, workflow_run_id=run_id)
        return await self.run()

    def lost_result(self) -> RowResult:
        """Return the result of a row whose run did not come up until the batch's end."""
        assert self.lost is not None  # noqa: S101
        error = f"{self.lost.error} Its run did not come up by the end of the batch: it may still run, and be paid for."
        return RowResult(self.row, "failed", error=error, attempts=self.lost.attempt + 1)

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise self.lost.error

    def close(self) -> None:
        """Hang up; the run goes on."""
        if self._follower is not None and self._follower.stream is not None:
            self._follower.stream.close()

    def close_unsent(self) -> None:
        """Take a start back of which no byte went out."""
        stream = self._follower.stream if self._follower is not None else None
        if self._follower is not None and isinstance(stream, AsyncWorkflowRunStream) and not stream.may_have_been_sent:
            stream.close()
            self._follower.stream = None

    def _new_follower(self) -> RowFollower:
        self.close()
        client, settings = self._client, self._client.settings
        self._found_run_id = None
        self._follower = follower = RowFollower(
            client.hook,
            client.clock,
            self._log,
            settings.poll_interval,
            "batch's",
            not_found_grace=settings.not_found_grace,
        )
        follower.before_send = self._check_start
        return follower

    def _check_start(self) -> None:
        """Let no start out, from whatever pause it comes, once the batch starts nothing any more."""
        if not self._client.places.starts_more:
            raise NoMoreStarts

    async def _find(self) -> RowPlan:
        """Look for a run that an earlier try may have started."""
        client, settings = self._client, self._client.settings

        async def take_step(step: Step) -> Any:
            if isinstance(step, Pause):
                return await client.hook.take_step(step)
            async with client.looks:
                return await client.hook.take_step(step)

        steps = client.resumption.find(
            self.row,
            RepeatedLook(client.clock, self._log, settings.poll_interval),
            grace_seconds=settings.not_found_grace,
            max_failures=settings.max_consecutive_failures,
            has_queued_runs=lambda: client.places.has_queued_runs,
        )
        return await run_steps_async(steps, take_step)

    async def _start(self, attempt: int) -> _Outcome:
        """Start a run and follow it."""
        client = self._client
        began = time.monotonic()
        while True:
            self.user = client.users.user_of(self.row, attempt)
            follower = self._new_follower()
            used = client.hook.connection
            start = follower.send_start(self._inputs, self.user, client.settings.workflow_id)
            search = RunSearch(self.user, time.time(), user_is_unique=True)
            try:
                run_id: str = await self._take(name_run(follower, start, search))
            except DifyAuthenticationError:
                if not await client.hook.connection_has_changed(used):
                    raise
                continue
            except DifyWorkflowRunUncertain as error:
                self.lost = LostStart(error, search, attempt)
                shows_no_run = follower.log_shows_no_run and not follower.is_in_queue()
                may_restart = client.settings.restart_lost_runs and shows_no_run
                return _Outcome("failed", str(error), can_be_repeated=may_restart)
            except DifyConnectionError as error:
                if not client.places.has_started_since(began) or not await self._take(dify_responds()):
                    raise
                # What refuses this start again and again takes those of other rows.
                outcome = _Outcome("failed", str(error), can_be_repeated=True, was_started=False)
            except DifyError as error:
                # Of this row only: Dify rejected it, or failed to start it, or it can't be sent.
                was_started = isinstance(error, DifyWorkflowRunFailed)
                outcome = _Outcome("failed", str(error), can_be_repeated=was_started, was_started=was_started)
            else:
                client.places.on_started(follower.stream.app_id if follower.stream is not None else None)
                outcome = await self._follow(follower, run_id)
            self.lost = None
            return outcome

    async def _follow(self, follower: RowFollower, run_id: str) -> _Outcome:
        settings = self._client.settings
        self._found_run_id = run_id
        wait = RunWait(run_id, settings.policy, log=self._log, was_seen=True)
        try:
            run, verdict = await self._take(follower.follow(wait, named_stream(follower), settings.timeout))
        except (DifyConnectionError, DifyAuthenticationError, DifyWorkflowRunTimeout):
            raise
        except DifyError as error:
            repeats = isinstance(error, DifyWorkflowRunFailed)
            return _Outcome("failed", str(error), run_id=run_id, can_be_repeated=repeats)
        if verdict.outcome is Outcome.TIMED_OUT:
            await self._take(stop_run(run_id, self.task_id, self.user, self._client.hook))
        return _outcome_of(run, verdict)

    async def _take(self, steps: Steps[Any]) -> Any:
        return await run_steps_async(steps, self._take_step)

    async def _take_step(self, step: Step) -> Any:
        if isinstance(step, PlaceAgain):
            return await self._client.places.on_refused(self.row, self._sent_at, step.error)
        if isinstance(step, SendStart):
            self._sent_at = time.monotonic()
        return await self._client.hook.take_step(step)

    def _result(self, outcome: _Outcome, attempts: int) -> RowResult:
        if outcome.run is not None:
            result = RowResult.of_run(self.row, outcome.run, attempts)
            return replace(result, status=outcome.status, error=outcome.error)
        return RowResult(
            self.row, outcome.status, error=outcome.error, workflow_run_id=outcome.run_id, attempts=attempts
        )


def _outcome_of(run: WorkflowRun, verdict: Verdict) -> _Outcome:
    error = (run.error or verdict.reason) if verdict.is_failure else run.error
    status = "failed" if verdict.outcome is Outcome.TIMED_OUT else str(run.status)
    return _Outcome(status, error, run, run.id, verdict.is_failure and verdict.can_be_repeated)
