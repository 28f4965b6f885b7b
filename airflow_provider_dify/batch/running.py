# SPDX-License-Identifier: Apache-2.0
"""A batch as a task's try, and while it runs: its rows on one event loop, their results as they come, and its end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.models import GOOD_STATUSES, is_server_from, one_line
from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.output import FileOutput, Output, ResultFiles, ReturnedOutput
from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.batch.resuming import EarlierTries, Resumption
from airflow_provider_dify.batch.row import BatchSettings, NoMoreStarts, RowRun
from airflow_provider_dify.batch.rows import FormCheck, Row, RowsAhead, count_rows, keep_listing, load_lazy, read_rows
from airflow_provider_dify.batch.slots import Places, RunLimit
from airflow_provider_dify.exceptions import (
    BATCH_SECTION,
    DifyConnectionError,
    DifyError,
    DifyTaskKilled,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.inputs import InputForm, read_form
from airflow_provider_dify.runs.waiting import Deadline
from airflow_provider_dify.tasks.loop import TaskLoop
from airflow_provider_dify.tasks.start import earliest_start, first_try_number

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger

# Seconds after which the batch looks at its clock, its parts and its progress, whatever happens.
_TICK = 0.5
# Seconds by which a row's deadline comes after the batch's own, which ends all rows at once.
_SECONDS_AFTER_DEADLINE = 60.0
# Airflow 3 kills a task's process 5 seconds after on_kill began.
_SECONDS_TO_STOP = 3.5
# Starts that get lost one after the other, beside those under way, until nothing more is started.
_MAX_LOST_IN_A_ROW = 10


class BatchRun:
    """
    One try of a batch while it runs. ``on_app`` gets the app's UUID, in the main thread, once a run has named it.
    ``will_be_retried`` says whether Airflow starts another try of a task that is killed now.
    """

    def __init__(
        self,
        settings: BatchSettings,
        client: DifyClient,
        loop: TaskLoop,
        users: RowUsers,
        output: Output,
        progress: BatchProgress,
        deadline: Deadline,
        log: Logger,
        on_app: Callable[[str], None],
        *,
        will_be_retried: bool,
    ) -> None:
        self.client = client
        self.deadline = replace(deadline, at=deadline.at + _SECONDS_AFTER_DEADLINE)
        self.users = users
        self.settings = settings
        self.log = log
        self._loop = loop
        self._output = output
        self._progress = progress
        self._deadline = deadline
        self._on_app = on_app
        self._will_be_retried = will_be_retried
        self._changed = asyncio.Event()
        self._stop_reason: DifyError | None = None
        self._failure: BaseException | None = None
        self._tasks: dict[asyncio.Task[None], RowRun] = {}
        self.places = Places(RunLimit(settings.max_active_runs), log, self._changed.set)
        self.check = FormCheck(log)
        self.resumption = Resumption(
            users,
            output.earlier,
            max_active_runs=settings.max_active_runs,
            run_retries=settings.run_retries,
            on_look=self._changed.set,
        )
        # Rows whose start got lost; they are looked for once more when no other row is under way.
        self._lost: list[RowRun] = []
        self._lost_in_a_row = 0
        self.last_start = 0.0
        self._link: asyncio.Task[None] | None = None
        self._stopped_runs: tuple[str, ...] = ()

    async def run(self) -> None:
        """
        Run the rows that have no result yet, and return when all are over or no more are to be started. Raises what
        ended the batch before its rows were over; what the rows say is in the progress.
        """
        try:
            await self._prepare()
            self._progress.begin(time.time())
            try:
                await self._run_rows()
            finally:
                await self._output.flush(self._stopped_runs if self._stop_reason is not None else ())
            if self._link is not None:
                await self._link
        except asyncio.CancelledError:
            raise _killed() from None
        if self._stop_reason is not None:
            raise self._stop_reason
        if self._failure is not None:
            raise self._failure
        self._progress.raise_if_tokens_used_up()

    async def _prepare(self) -> None:
        """Read the form, and write the first part."""
        form = await read_form(self.client) or InputForm()
        # The form that Dify shows is the current version's.
        self.check.form = form if self.settings.workflow_id is None else form.limits_only()
        if self.client.address:
            self.log.info("%s", self.client.address)
        if self._output.earlier.can_be:
            self.log.info("Looking into Dify's log for the runs that an earlier try may have started.")
        await self._output.begin()

    async def _run_rows(self) -> None:
        settings = self.settings
        found = read_rows(settings.inputs, settings.json_columns, settings.file_columns)
        rows = RowsAhead(row for row in found if not self._output.has(row.index))
        next_line = time.monotonic() + settings.progress_interval
        has_more = True

        async def write() -> None:
            with self._failing_later():
                await self._output.write_if_due()

        try:
            while self._tasks or self._lost or (has_more and self.starts_more):
                if not self._tasks and not (has_more and self.starts_more):
                    self._look_once_more()
                while self.starts_more and self.places.grant():
                    pass
                while has_more and self.starts_more and self._may_take():
                    row = None
                    with self._failing_later():
                        row = await rows.next()
                    has_more = row is not None
                    if row is not None:
                        self._take(row)
                        # Rows that are never started may be many, and follow each other at once.
                        await write()
                await self._wait_for_change()
                if self._deadline.is_over:
                    self._stop_reason = self._stop_reason or self._timed_out()
                if self._stop_reason is not None:
                    break
                if not self.starts_more:
                    # Who waits for a place gets none any more.
                    self._cancel([task for task, run in self._tasks.items() if not self.places.holds(run.row)])
                await write()
                if time.monotonic() >= next_line:
                    next_line = time.monotonic() + settings.progress_interval
                    self.log.info("%s", self._progress.line(self.places.taken, time.time()))
        except asyncio.CancelledError:
            self._stop_reason = _killed()
            raise
        finally:
            if self._stop_reason is not None:
                await self._stop_runs()
            lost = [run for run in (*self._lost, *self._tasks.values()) if run.lost is not None]
            self._cancel(self._tasks)
            await asyncio.gather(*self._tasks, return_exceptions=True)
            for run in lost:
                # So that no retry pays for it twice.
                self._on_result(run.lost_result())

    def _may_take(self) -> bool:
        return not self.places.waiting and self.places.may_take() and self.resumption.may_take

    @contextmanager
    def _failing_later(self) -> Iterator[None]:
        """Let a DifyError end the batch, once what runs was followed to its end."""
        try:
            yield
        except DifyError as error:
            self._failure = self._failure or error

    @staticmethod
    def _cancel(tasks: Iterable[asyncio.Task[None]]) -> None:
        for task in list(tasks):
            task.cancel()

    def _take(self, row: Row) -> None:
        """Begin with a row: check its inputs, and do what is to be done with it."""
        inputs = self.check.inputs_of(row)
        error = row.error if row.inputs is None else self.check.problem_of(inputs)
        if row.inputs is None or error is not None:
            self._on_result(RowResult(row.index, "failed", error=error, attempts=0))
            return
        run = RowRun(self, row.index, inputs, may_be_started=self.resumption.take(row.index))
        if not run.may_be_started:
            self.places.take(row.index)
        self._begin(run, run.run())

    def _look_once_more(self) -> None:
        """Look for the runs of lost starts, now that no other row is under way."""
        lost, self._lost = self._lost, []
        for run in lost:
            self.places.take(run.row)
            self._begin(run, run.run_if_found())

    def _begin(self, run: RowRun, work: Coroutine[Any, Any, RowResult]) -> None:
        task = asyncio.create_task(self._run_row(run, work))
        self._tasks[task] = run
        task.add_done_callback(self._on_done)

    async def _run_row(self, run: RowRun, work: Coroutine[Any, Any, RowResult]) -> None:
        try:
            result = await work
        except NoMoreStarts:
            return
        except DifyWorkflowRunUncertain as error:
            self._on_lost(run, error)
            return
        if self._stop_reason is None or result.status in GOOD_STATUSES or run.lost is not None:
            run.lost = None
            self._on_result(result)
            if result.workflow_run_id is None:
                self._output.on_untraced(run.row, is_lost=False)

    def _on_lost(self, run: RowRun, error: DifyWorkflowRunUncertain) -> None:
        self.log.warning(
            "Row %d: Dify's log shows no run of its start. It is looked for once more when the other rows are over.",
            run.row,
        )
        self._lost.append(run)
        self._output.on_untraced(run.row, is_lost=True)
        self._lost_in_a_row += 1
        if self._lost_in_a_row > max(_MAX_LOST_IN_A_ROW, self.settings.max_active_runs) and self._failure is None:
            self._failure = DifyConnectionError(
                f"{error} The last {self._lost_in_a_row:,} starts got lost like this, so no more are sent. A retry "
                "continues with the other rows."
            ).explained_in(BATCH_SECTION)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        run = self._tasks.pop(task)
        run.close()
        self.places.give_back(run.row)
        if task.cancelled():
            return
        error = task.exception()
        if isinstance(error, DifyWorkflowRunTimeout):
            self._stop_reason = self._stop_reason or self._timed_out()
        elif error is not None and self._failure is None:
            # Of the way to Dify, or of this package: no row can go on.
            self._failure = error

    def _on_result(self, result: RowResult) -> None:
        is_failure = self._progress.add(result)
        with self._failing_later():
            self._output.add(result)
        if is_failure:
            run = f"workflow run {result.workflow_run_id}, status {one_line(result.status, 40)}"
            self.log.warning(
                "Row %d failed: %s (%s)",
                result.index,
                one_line(result.error or "Dify gave no error text"),
                run if result.workflow_run_id else "no workflow run",
            )

    async def _wait_for_change(self) -> None:
        until_place = self.places.seconds_until_change() if self.places.waiting or self.starts_more else None
        timer = asyncio.get_running_loop().call_later(
            _TICK if not until_place else min(_TICK, until_place), self._changed.set
        )
        await self._changed.wait()
        timer.cancel()
        self._changed.clear()

    def _timed_out(self) -> DifyWorkflowRunTimeout:
        return DifyWorkflowRunTimeout(
            f"The batch's timeout of {self.settings.timeout:g} seconds is over. "
            f"{self._progress.line(self.places.taken, time.time())}."
        ).explained_in(BATCH_SECTION)

    # --- what the rows ask for

    @property
    def starts_more(self) -> bool:
        """Whether runs are still to be started."""
        return (
            self._stop_reason is None
            and self._failure is None
            and not self._progress.has_failed
            and not self._progress.has_used_tokens_up
            and not self._deadline.is_over
        )

    @property
    def has_queued_runs(self) -> bool:
        """Whether a start that Dify has accepted has no run yet."""
        return any(run.is_queued for run in self._tasks.values())

    def on_started(self, app_id: str | None) -> None:
        """Take note that Dify took a start, and let the main thread push the link to the app."""
        self.places.limit.on_started()
        self.last_start, self._lost_in_a_row = time.monotonic(), 0
        if app_id is not None and self._link is None:
            self._link = asyncio.create_task(self._loop.ask(partial(self._on_app, app_id)))

    def on_repeated(self, result: RowResult) -> None:
        """Count the tokens of a run that failed, because the row's result is that of its next one."""
        self._progress.total_tokens += result.total_tokens or 0

    # --- the end

    async def _stop_runs(self) -> None:
        """Ask Dify to stop what runs, unless a retry of this task would wait for a run that was stopped."""
        is_killed = isinstance(self._stop_reason, DifyTaskKilled)
        remembers = self._output.remembers_stops or is_server_from(self.client.server_version, (1, 16))
        if is_killed and self._will_be_retried and not remembers:
            # Neither this Airflow nor this Dify would remember the stop.
            self.log.info("%d workflow runs keep running for the retry of this task.", len(self._tasks))
            return
        stops = [asyncio.create_task(run.stop()) for run in self._tasks.values()]
        if not stops:
            return
        done, late = await asyncio.wait(stops, timeout=_SECONDS_TO_STOP)
        for stop in late:
            stop.cancel()
        reports = [found for stop in done if not stop.exception() and (found := stop.result())]
        for _, report in reports:
            if report.is_warning:
                self.log.warning("%s", report.message)
        self._stopped_runs = tuple(run_id for run_id, report in reports if report.was_asked)
        line = "Asked Dify to stop %d workflow runs, of %d rows that were under way."
        self.log.info(line, len(self._stopped_runs), len(stops))


def _killed() -> DifyTaskKilled:
    return DifyTaskKilled(
        "Airflow killed the task while its batch was running. A retry continues the batch."
    ).explained_in(BATCH_SECTION)


class BatchTask:
    """One try of the operator, with the hook whose connection counts; ``push`` pushes the XCom ``batch``."""

    def __init__(
        self,
        settings: BatchSettings,
        context: Context,
        hook: DifyHook,
        log: Logger,
        push: Callable[[dict[str, Any]], None],
    ) -> None:
        self._settings = settings
        self._context, self._ti = context, context["ti"]
        self._will_be_retried = bool(self._ti.try_number <= (self._ti.max_tries or 0))
        self._hook = hook
        self._log = log
        self._push = push
        self._loop = TaskLoop()

    def run(self, on_app: Callable[[str], None]) -> Any:
        """
        Run the batch, or what earlier tries have left of it; return and raise what the operator does. ``on_app`` gets
        the app's UUID, once a run has named it.
        """
        settings = self._settings = replace(self._settings, inputs=load_lazy(self._settings.inputs))
        deadline = Deadline.after(settings.timeout, "batch's")
        users = RowUsers.of_task(self._ti, settings.user)
        total = count_rows(settings.inputs, settings.json_columns)
        progress = BatchProgress(
            total,
            settings.max_failed_runs,
            began_at=time.time(),
            fail_on_partial_success=settings.wait.fail_on_partial_success,
            output_path=settings.output_path,
            max_total_tokens=settings.max_total_tokens,
        )
        output = self._output(total, progress)

        async def run_rows() -> None:
            # A start that gets lost with a kept connection is looked for in the log, and no row is lost with it.
            async with self._hook.client_on(self._loop, keeps_connections=True) as client:
                await BatchRun(
                    settings,
                    client,
                    self._loop,
                    users,
                    output,
                    progress,
                    deadline,
                    self._log,
                    on_app,
                    will_be_retried=self._will_be_retried,
                ).run()

        self._push(progress.summary(time.time()))
        if progress.over:
            self._log.info("%d of %d rows are over already, by an earlier try.", progress.over, total)
        try:
            if progress.over < total and not output.is_complete:
                self._loop.run(run_rows())
        except BaseException as error:
            is_last = isinstance(error, AirflowFailException) or not self._will_be_retried
            # No other try comes, so what is there is written all the same.
            if is_last and progress.over:
                with suppress(DifyError):
                    output.finish()
                    output.remove_parts()
            raise
        finally:
            self._push(progress.summary(time.time()))
        self._log.info("%s", progress.line(0, time.time()))
        result = output.finish()
        try:
            progress.raise_if_failed(time.time())
        finally:
            output.remove_parts()
        return result

    def kill(self) -> None:
        """Stop what runs, because Airflow ends the task."""
        self._loop.kill()

    def _output(self, total: int, progress: BatchProgress) -> Output:
        since = earliest_start(self._context)
        number = self._ti.try_number - first_try_number(self._ti, self._settings.retries)
        earlier = EarlierTries(since, self._ti.try_number > 1, number)
        path = self._settings.output_path
        if path is None:
            keep_listing(self._settings.inputs, self._context.get("task_state_store"), self._ti.max_tries)
            return ReturnedOutput(total, earlier)
        files = ResultFiles(path, BatchName.of_task(self._ti))
        files.check(self._settings.inputs)
        return FileOutput(files, self._settings.max_active_runs, progress, earlier)
