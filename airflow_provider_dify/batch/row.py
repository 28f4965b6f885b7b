# SPDX-License-Identifier: Apache-2.0
"""One row of a batch: its place, its start, its run, and its retries."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.models import WorkflowRun, one_line
from airflow_provider_dify.api.run_stream import NO_EXTRAS, StartExtras
from airflow_provider_dify.batch.naming import RowUsers
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.batch.resuming import Resumption, RowPlan
from airflow_provider_dify.batch.rows import FormCheck
from airflow_provider_dify.batch.slots import Places
from airflow_provider_dify.exceptions import (
    BATCH_SECTION,
    DifyAuthenticationError,
    DifyConnectionError,
    DifyError,
    DifyFilesLost,
    DifyWorkflowRunFailed,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.downloads import save_files
from airflow_provider_dify.runs.log import RunSearch, delay_after, looking_again
from airflow_provider_dify.runs.starting import Starter
from airflow_provider_dify.runs.stopping import StopReport, stop_run
from airflow_provider_dify.runs.waiting import Deadline, Outcome, RunWait, Verdict, WaitArguments

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

# Seconds before a run that failed is started again; doubled with each further failure.
RETRY_DELAY = 1.0
# Longer than for a single run, because a server that is restarted must not end a batch.
START_RETRIES = 7
# Seconds without a name after which an accepted start shows that Dify's queue is not empty.
_SECONDS_BEFORE_QUEUED = 5.0
# For a start that is under way when the batch is killed.
_SECONDS_TO_BE_NAMED = 2.0
# Characters of a warning, which may end with what Dify said.
_LOG_LENGTH = 1000


class NoMoreStarts(Exception):
    """The batch starts nothing any more: it is killed, its time is over, or too many rows have failed."""


@dataclass(frozen=True)
class BatchSettings:
    """What the operator's arguments say, rendered; each as there, times in seconds."""

    inputs: Any
    wait: WaitArguments
    max_active_runs: int
    timeout: float
    output_path: str | None = None
    max_failed_runs: float = 0
    run_retries: int = 0
    max_total_tokens: int | None = None
    json_columns: tuple[str, ...] = ()
    file_columns: tuple[str, ...] = ()
    output_files: str | None = None
    user: str | None = None
    workflow_id: str | None = None
    progress_interval: float = 30.0
    restart_lost_runs: bool = False
    retries: int = 0  # Airflow's, of the task
    extras: StartExtras = NO_EXTRAS


class Batch(Protocol):
    """What a row has to know of its batch."""

    client: DifyClient
    deadline: Deadline
    users: RowUsers
    resumption: Resumption
    places: Places
    settings: BatchSettings
    log: Logger
    # By time.monotonic: when Dify took the last start of any row.
    last_start: float
    check: FormCheck

    @property
    def starts_more(self) -> bool:
        """Whether runs are still to be started."""

    @property
    def has_queued_runs(self) -> bool:
        """Whether a start that Dify has accepted has no run yet."""

    def on_started(self, app_id: str | None) -> None:
        """Take note that Dify took a start, for a run of this app."""

    def on_repeated(self, result: RowResult) -> None:
        """Take note that a row whose run failed had another one."""


class RowLog:
    """The log of one row: the warnings of its run, with the row in front. A line for each node would be too many."""

    def __init__(self, row: int, log: Logger) -> None:
        self._row = row
        self._log = log

    def info(self, message: str, *args: Any) -> None:
        """Leave out what a batch has too much of."""

    def warning(self, message: str, *args: Any) -> None:
        """Log a warning of the row's run."""
        self._log.warning("%s", one_line(f"Row {self._row}: {message % args}", _LOG_LENGTH))


@dataclass(frozen=True)
class _Outcome:
    """What became of one run of a row, or of a start that has none."""

    result: RowResult
    can_be_repeated: bool = False
    was_started: bool = True  # whether it counts among the row's attempts


@dataclass(frozen=True)
class LostStart:
    """A start that went out, and whose run was not found: it may run, and be paid for. Attempts count from 0."""

    error: DifyWorkflowRunUncertain
    search: RunSearch
    attempt: int


class RowRun:
    """One row of a batch, with its inputs, which were checked."""

    def __init__(self, batch: Batch, row: int, inputs: Mapping[str, Any], *, may_be_started: bool) -> None:
        self.row = row
        # By an earlier try, so that it is looked for first.
        self.may_be_started = may_be_started
        # The last start, if it got lost.
        self.lost: LostStart | None = None
        self._batch = batch
        self._inputs = inputs
        self._plan = RowPlan()
        self._log: Any = RowLog(row, batch.log)
        self._found_run_id: str | None = None
        self._sent_at = 0.0
        self._user = ""
        self._uploaded: Counter[str] = Counter()
        self._starter = self._new_starter()

    @property
    def is_queued(self) -> bool:
        """Whether Dify has accepted the start some time ago, and named no run yet."""
        stream = self._starter.stream
        is_unnamed = stream is not None and stream.is_accepted and self._run_id is None
        return is_unnamed and time.monotonic() - self._sent_at > _SECONDS_BEFORE_QUEUED

    async def run(self) -> RowResult:
        """
        Run the row to its end, and return the result of its last run. Raises NoMoreStarts if the batch ends before its
        first start, a DifyWorkflowRunUncertain if the run of a start was not found, and any other DifyError for what
        ends the batch, and says nothing about the row.
        """
        batch = self._batch
        if self.may_be_started:
            self._plan = await self._find()
            self.may_be_started = False
            await batch.places.wait(self.row)
        outcome: _Outcome | None = None
        while True:
            plan = self._plan
            if plan.workflow_run_id is not None:
                self._user = batch.users.user_of(self.row, plan.attempt)
                self._renew_starter()
                outcome = await self._follow(plan.workflow_run_id)
            else:
                try:
                    earlier, outcome = outcome, await self._start(plan.attempt)
                except NoMoreStarts:
                    if outcome is None:
                        raise
                    self._raise_if_lost()
                    return replace(outcome.result, attempts=plan.attempt)
                if earlier is not None:
                    batch.on_repeated(earlier.result)
            is_last = plan.failures >= batch.settings.run_retries or not batch.starts_more
            if is_last or not outcome.can_be_repeated:
                self._raise_if_lost()
                return replace(outcome.result, attempts=plan.attempt + (1 if outcome.was_started else 0))
            self._plan = RowPlan(plan.attempt + 1, plan.failures + 1)
            delay = delay_after(DifyConnectionError(), plan.failures + 1, RETRY_DELAY)
            self._log.warning(
                "%s failed and is started again in %.1f seconds, retry %d of %d: %s",
                f"run {outcome.result.workflow_run_id}" if outcome.result.workflow_run_id else "its start",
                delay,
                plan.failures + 1,
                batch.settings.run_retries,
                outcome.result.error,
            )
            await asyncio.sleep(delay)

    async def run_if_found(self) -> RowResult:
        """Look once more for the run of a start that got lost, and follow it if it came up; return the row's result."""
        lost = self.lost
        assert lost is not None  # noqa: S101
        # Once; only a look that failed is repeated.
        grace = self._batch.settings.wait.not_found_grace
        self._renew_starter()
        try:
            run_id = await self._starter.search_run(lost.search, lost.error, 0.0, grace)
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

    def close(self) -> None:
        """Hang up; the run continues."""
        self._starter.close()

    async def stop(self) -> tuple[str, StopReport] | None:
        """Stop the run, if it has a name soon; return its id and what became of the stop."""
        stream = self._starter.stream
        if stream is not None and not stream.may_have_been_sent:
            # No byte of it went out.
            stream.close()
            self._starter.stream = None
        until = time.monotonic() + _SECONDS_TO_BE_NAMED
        while self._starter.stream is not None and self._run_id is None and time.monotonic() < until:  # noqa: ASYNC110
            # Read by the row's own task.
            await asyncio.sleep(0.05)
        run_id = self._run_id
        if run_id is None:
            return None
        named = self._starter.named_stream
        task_id = named.task_id if named is not None else None
        return run_id, await stop_run(self._batch.client, run_id, task_id, self._user)

    @property
    def _run_id(self) -> str | None:
        named = self._starter.named_stream
        return named.workflow_run_id if named is not None else self._found_run_id

    def _raise_if_lost(self) -> None:
        if self.lost is not None:
            raise self.lost.error

    def _renew_starter(self) -> None:
        self.close()
        self._found_run_id = None
        self._starter = self._new_starter()

    def _new_starter(self) -> Starter:
        batch = self._batch
        starter = Starter(batch.client, batch.deadline, self._log, batch.settings.wait, one_of_many=True)
        starter.extras = batch.settings.extras
        starter.form, starter.uploaded = batch.check.form, self._uploaded
        starter.start_retries = START_RETRIES
        starter.before_send = self._before_send
        starter.wait_for_room = self._wait_for_room
        return starter

    async def _before_send(self) -> None:
        """Let no start out, from whatever pause it comes, once the batch starts nothing any more."""
        if not self._batch.starts_more:
            raise NoMoreStarts
        self._sent_at = time.monotonic()

    async def _wait_for_room(self, error: DifyConnectionError) -> None:
        await self._batch.places.after_refusal(self.row, self._sent_at, error)

    async def _find(self) -> RowPlan:
        """Look for a run that an earlier try may have started."""
        batch, wait = self._batch, self._batch.settings.wait
        on_failure = looking_again(self._log, wait.max_consecutive_failures)
        return await batch.resumption.find(
            batch.client, self.row, batch.deadline, wait, on_failure, lambda: batch.has_queued_runs
        )

    async def _start(self, attempt: int) -> _Outcome:
        """Start a run and follow it."""
        batch, settings = self._batch, self._batch.settings
        began = time.monotonic()
        self._user = batch.users.user_of(self.row, attempt)
        self._renew_starter()
        starter = self._starter
        search = RunSearch(self._user, time.time(), user_is_unique=True)
        try:
            run_id = await starter.start_and_name(self._inputs, settings.workflow_id, search)
        except DifyAuthenticationError:
            raise
        except DifyWorkflowRunUncertain as error:
            self.lost = LostStart(error, starter.known(search), attempt)
            shows_no_run = starter.log_shows_no_run and not starter.is_in_queue
            return self._failed(error, can_be_repeated=settings.restart_lost_runs and shows_no_run)
        except DifyConnectionError as error:
            if batch.last_start <= began or not await self._dify_responds():
                raise
            # What refuses this start again and again takes those of other rows.
            outcome = self._failed(error, can_be_repeated=True, was_started=False)
        except DifyError as error:
            # Of this row only: Dify rejected it, or failed to start it, or it can't be sent.
            was_started = isinstance(error, DifyWorkflowRunFailed)
            outcome = self._failed(error, can_be_repeated=was_started, was_started=was_started)
        else:
            batch.on_started(starter.stream.app_id if starter.stream is not None else None)
            outcome = await self._follow(run_id)
        self.lost = None
        return outcome

    async def _follow(self, run_id: str) -> _Outcome:
        self._found_run_id = run_id
        starter = self._starter
        wait = RunWait(run_id, starter.arguments, log=self._log, was_seen=True)
        try:
            try:
                run, verdict = await starter.follow(wait, starter.named_stream)
            except DifyConnectionError:
                if not await self._dify_responds():
                    raise
                # Once more: Dify may have come back just now.
                run, verdict = await self._follow_unreadable(wait)
        except (DifyConnectionError, DifyAuthenticationError, DifyWorkflowRunTimeout):
            raise
        except DifyError as error:
            return self._failed(error, run_id, can_be_repeated=isinstance(error, DifyWorkflowRunFailed))
        if verdict.outcome is Outcome.TIMED_OUT:
            await self.stop()
        run, lost = await self._save_files(run, verdict)
        result = replace(RowResult.of_run(self.row, run), uploaded=dict(self._uploaded) or None)
        if verdict.is_failure:
            status = "failed" if verdict.outcome is Outcome.TIMED_OUT else result.status
            result = replace(result, status=status, error=run.error or verdict.reason)
        if lost is not None:
            result = replace(result, status="failed", error=str(lost))
        return _Outcome(result, can_be_repeated=verdict.is_failure and verdict.can_be_repeated)

    async def _save_files(self, run: WorkflowRun, verdict: Verdict) -> tuple[WorkflowRun, DifyFilesLost | None]:
        """Save the run's files in the row's folder; what may pass ends the batch, whose retry reads the run again."""
        folder = self._batch.settings.output_files
        if folder is not None:
            folder = folder.replace("{index}", str(self.row)) if "{index}" in folder else f"{folder}/{self.row}"
        run, lost = await save_files(self._batch.client, run, verdict, folder, self._log)
        if lost is not None and not isinstance(lost, DifyFilesLost):
            raise lost
        return run, lost

    async def _follow_unreadable(self, wait: RunWait) -> tuple[WorkflowRun, Verdict]:
        try:
            return await self._starter.follow(wait, None)
        except DifyConnectionError as error:
            raise DifyError(
                f"{error} Only this run's record can't be read: other requests succeed. The batch continues without "
                f"its result; look at workflow run {wait.workflow_run_id} in Dify's log."
            ).explained_in(BATCH_SECTION) from None

    async def _dify_responds(self) -> bool:
        """Return whether Dify responds at all, so that what fails again and again is of one row."""
        try:
            await self._batch.client.perform(calls.app_info())
        except DifyError as error:
            # Any other is Dify's own word, whatever it is.
            return not isinstance(error, (DifyConnectionError, DifyAuthenticationError))
        return True

    def _failed(self, error: DifyError, run_id: str | None = None, **facts: bool) -> _Outcome:
        uploaded = dict(self._uploaded) or None
        return _Outcome(
            RowResult(self.row, "failed", error=str(error), workflow_run_id=run_id, uploaded=uploaded), **facts
        )
