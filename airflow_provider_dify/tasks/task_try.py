# SPDX-License-Identifier: Apache-2.0
"""One try of the operator while it runs: its start, its run, and what Airflow knows of them."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_dify.api.calls import plain_inputs
from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.http_response import reason_of
from airflow_provider_dify.api.models import WorkflowRun, is_server_from
from airflow_provider_dify.api.run_stream import AsyncWorkflowRunStream
from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyError,
    DifyTaskKilled,
    DifyWorkflowRunFailed,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.downloads import save_files
from airflow_provider_dify.runs.log import before_start
from airflow_provider_dify.runs.starting import Starter
from airflow_provider_dify.runs.stopping import STOP_TIMEOUT, StopReport
from airflow_provider_dify.runs.uploads import look_at_files
from airflow_provider_dify.runs.waiting import Deadline, Outcome, RunWait, Verdict, WaitArguments
from airflow_provider_dify.tasks.loop import TaskLoop
from airflow_provider_dify.tasks.start import (
    SECONDS_FOR_LOG,
    RunArguments,
    StartMemory,
    TaskDefers,
    TaskStart,
    earliest_start,
    find_earlier_start,
    find_through_failures,
    lost_start,
    new_start,
    starts_of_earlier_tries,
    stop_start,
)
from airflow_provider_dify.tasks.xcoms import TaskXComs

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger

T = TypeVar("T")

# How long a worker waits for a queued run before it leaves that to the triggerer.
SECONDS_BEFORE_DEFERRAL = 5.0
# How soon a start counts as queued, and Airflow is to remember that.
SECONDS_BEFORE_QUEUED = 1.0
# How long a killed task waits for a start that is under way, so as to stop it, and for Airflow to take a message.
SECONDS_AFTER_KILL = 2.0


class RunningTask:
    """One try of the operator while it runs: its work is done on an event loop, and the main thread waits for it."""

    def __init__(
        self,
        arguments: RunArguments,
        context: Context,
        hook: DifyHook,
        deadline: Deadline,
        log: Logger,
        xcoms: TaskXComs,
        on_user: Callable[[str], None] = lambda user: None,
    ) -> None:
        self.context = context
        self.deadline = deadline
        self._arguments = arguments
        self._hook = hook
        self._log = log
        self._xcoms = xcoms
        # Gets the `user` of the start, in the main thread.
        self._on_user = on_user
        self._memory = StartMemory(context)
        self._loop = TaskLoop()
        self._ask = self._loop.ask
        # Read here, in the main thread: on Airflow 2 a task instance is a row of its database.
        self._ti: Any = context["ti"]
        self._try_number = int(self._ti.try_number)
        self._will_be_retried = self._try_number <= (self._ti.max_tries or 0)
        self._start: TaskStart | None = None
        self._run_is_over = False

    # --- in the main thread

    @property
    def task_start(self) -> TaskStart:
        """The start, once there is one."""
        assert self._start is not None  # noqa: S101
        return self._start

    def execute(self) -> Any:
        """
        Start the run, or continue an earlier try's, and wait for it; return the outputs, or the id without a wait.
        Raises a TaskDefers if the triggerer is to wait, and a DifyError as the operator does.
        """
        # Here, in the main thread, and for a start only: inputs may be megabytes.
        self._arguments = replace(self._arguments, inputs=plain_inputs(self._arguments.inputs))
        try:
            result = self._run(self._execute)
        except TaskDefers:
            self._end_if_killed()
            raise
        if not self._arguments.waits:
            self._end_if_killed()
        self.mark_returned()
        return result

    def resume(self, data: Mapping[str, Any] | None, event: Any, error: DifyError | None) -> dict[str, Any]:
        """
        Take up the start that the task deferred with: read its run, or fail with the error as the wait did. ``data`` is
        the serialized start; ``None`` where Airflow lost it, and for ``dag.test()``, which returns the event alone.
        """
        self._take_up(data, event)
        try:
            outputs = self._run(partial(self._resume, error))
        except DifyError as failure:
            if error is not None and failure is not error:
                # The way to Dify is lost, too; the task ends for the other reason.
                self._log.warning("%s", failure)
                raise error from None
            raise
        self.mark_returned()
        return outputs

    def mark_returned(self) -> None:
        """Let a clear that keeps the task's state start another run: the task has got the outputs of this one."""
        self._memory.mark_returned(self.task_start)

    def stop_after_deferral(self) -> None:
        """Stop the run of a deferred task whose ``execution_timeout`` is over (Airflow 2)."""
        self._take_up(None, None)
        self._run(self._stop_after_kill)

    def kill(self) -> None:
        """Cancel what runs, because Airflow ends the task; its run is stopped then."""
        self._loop.kill()

    def _end_if_killed(self) -> None:
        """End a try that was killed when its work was just over: nobody waits for the run."""
        if self._loop.was_killed:
            self._loop = TaskLoop()
            self._ask = self._loop.ask
            self._run(self._stop_after_kill)
            raise DifyTaskKilled("Airflow killed the task while it waited for Dify. A retry finds its run again.")

    def _run(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        return self._loop.run(self._with_client(work))

    def _take_up(self, data: Mapping[str, Any] | None, event: Any) -> None:
        start = TaskStart.deserialize(data) or self._memory.load()
        if start is None or start.try_number != self._try_number:
            start = new_start(self._ti, self._arguments.user, self._arguments.inputs, (), earliest_start(self.context))
            # The event names the run, but not the task id that a stop takes.
            run_id, task_id = (
                self._ti.xcom_pull(task_ids=self._ti.task_id, key=key, map_indexes=self._ti.map_index)
                for key in ("workflow_run_id", "task_id")
            )
            if run_id:
                start = replace(start, workflow_run_id=str(run_id), task_id=task_id)
        self._start = start
        named = event.get("workflow_run_id") if isinstance(event, dict) else None
        if start.workflow_run_id is None and named:
            self._start = replace(start, workflow_run_id=str(named))
            self._push(self._start)
        self._on_user(start.user)

    def _push(self, start: TaskStart) -> None:
        """Store the run everywhere at once, so that no crash loses it."""
        self._memory.save(start)
        self._xcoms.push_ids(str(start.workflow_run_id), start.task_id)

    # --- on the event loop

    async def _with_client(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._hook.client_on(self._loop) as client:
            client.deadline = self.deadline.at
            self._client: DifyClient = client
            self._starter = Starter(client, self.deadline, self._log, self._arguments.wait)
            try:
                return await work()
            except asyncio.CancelledError:
                await self._stop_after_kill()
                raise
            except TaskDefers:
                raise
            except Exception as error:
                # Of any type: an XCom backend that fails must not leave a run alone either.
                await self._stop_if_nobody_waits(error)
                raise
            finally:
                self._starter.close()
                self._hook.server_version = client.server_version or self._hook.server_version

    async def _execute(self) -> Any:
        await look_at_files(self._arguments.inputs)
        await self._find_or_start()
        await self._ask(partial(self._on_user, self.task_start.user))
        if not self._arguments.waits:
            return self.task_start.workflow_run_id
        stream = self._starter.stream
        if not self._arguments.deferrable or self._run_is_over or (stream is not None and stream.has_ended):
            return await self._finish(*await self._follow())
        if self.task_start.workflow_run_id is not None and self._arguments.defer_after > 0:
            with contextlib.suppress(asyncio.TimeoutError):
                # Most runs are over soon, and a deferral costs a worker's start.
                return await self._finish(*await asyncio.wait_for(self._follow(), self._arguments.defer_after))
        raise TaskDefers

    async def _resume(self, error: DifyError | None) -> dict[str, Any]:
        if isinstance(error, DifyTaskKilled):
            # What Airflow does on a worker.
            await self._stop_after_kill()
        if error is not None:
            raise error
        return await self._finish(*await self._follow())

    async def _follow(self) -> tuple[WorkflowRun, Verdict]:
        links: list[asyncio.Future[None]] = []

        def on_first_run(run: WorkflowRun) -> None:
            links.append(asyncio.ensure_future(self._ask(partial(self._xcoms.push_link, run.app_id))))

        run_id = str(self.task_start.workflow_run_id)
        wait = RunWait(run_id, self._arguments.wait, log=self._log, on_first_run=on_first_run, was_seen=True)
        found = await self._starter.follow(wait, self._starter.named_stream)
        await asyncio.gather(*links)
        return found

    async def _finish(self, run: WorkflowRun, verdict: Verdict) -> dict[str, Any]:
        """Push what the run returned, and return its outputs, or raise what it means."""
        self._run_is_over = verdict.outcome is not Outcome.TIMED_OUT
        starts_again = True
        if verdict.is_failure and run is self._starter.ended_run:
            # The record goes on saying that the run is not over: before Airflow 3.3 a retry would take it up.
            is_kept = await self._try_to_remember(replace(self.task_start, has_ended=True))
            starts_again = is_kept or not self._starter.record_is_open
        run, lost = await save_files(self._client, run, verdict, self._arguments.output_files, self._log)
        more: Any = {"price": self._starter.progress.price, "starts_again": starts_again, "files_error": lost}
        return await self._ask(partial(self._xcoms.push_and_return, run, verdict, **more))

    async def _find_or_start(self) -> None:
        """Start a run, or find the one that an earlier try started. It is named then, unless the task is to defer."""
        found = await self._find_earlier_start()
        if found is None:
            await self._start_new_run()
            return
        start, run = found
        if run is not None:
            await self._continue(start, run)
        elif not await self._continue_unnamed(start):
            await self._start_new_run()

    async def _find_earlier_start(self) -> tuple[TaskStart, WorkflowRun | None] | None:
        remembered = await self._ask(self._memory.load)
        searches = await self._ask(lambda: list(starts_of_earlier_tries(self.context, self._arguments)))
        wait = self._arguments.wait
        look = partial(find_earlier_start, self._client, wait, remembered, searches, self._try_number)
        return await find_through_failures(look, wait, self.deadline, self._log)

    async def _continue(self, start: TaskStart, run: WorkflowRun) -> None:
        verdict = WaitArguments().judge(run)
        self._run_is_over = verdict.outcome is Outcome.DONE
        self._log.info("Continuing the run that an earlier try started. %s", verdict.reason)
        await self._remember(replace(start, try_number=self._try_number))
        await self._ask(partial(self._xcoms.push_link, run.app_id))

    async def _continue_unnamed(self, start: TaskStart) -> bool:
        """
        Wait for the run of a start that was under way when an earlier try was killed; return whether this try goes on
        with it, else a new run is to be started.
        """
        self._log.info("An earlier try was ended while its start was under way; looking for its run.")
        self._start = start
        error = lost_start(start.user)
        if self._arguments.deferrable and start.was_accepted:
            return True
        starter = self._starter
        seconds = self.deadline.left if start.was_accepted else self._arguments.wait.not_found_grace
        if await self._search(start, error, seconds, patience_seconds=SECONDS_FOR_LOG):
            return True
        if starter.last_look_failed:
            # Airflow remembers the start, so the next try looks again.
            raise DifyConnectionError(f"Dify's log could not be read. {error}")
        # A server that doesn't queue shows each run at once.
        may_start = not starter.may_be_queued or (self._arguments.restart_lost_runs and starter.log_shows_no_run)
        if start.was_accepted or not may_start:
            raise error
        self._log.warning("Dify's log shows no run of the earlier try's start; starting a new run.")
        self._start = None
        return False

    async def _start_new_run(self) -> None:
        arguments, starter = self._arguments, self._starter
        if arguments.workflow_id is None:
            # The form that Dify shows is the current version's.
            await starter.check_inputs(arguments.inputs)
        before, sent_at = await before_start(self._client, arguments.user)
        start = await self._ask(lambda: new_start(self._ti, arguments.user, arguments.inputs, before, sent_at))
        if self._client.address:
            self._log.info("%s", self._client.address)
        starter.extras = arguments.extras
        starter.before_send = lambda: self._keep(start)
        starter.after_refusal = lambda: self._keep(None)
        try:
            stream = await starter.send_start(arguments.inputs, start.user, arguments.workflow_id)
        except DifyWorkflowRunUncertain as error:
            await self._wait_in_log(start, error)
        except Exception:
            # Nothing was started.
            await self._keep(None)
            raise
        else:
            await self._wait_on_stream(start, stream)

    async def _keep(self, start: TaskStart | None) -> None:
        """Let Airflow keep a start before it is sent, so that a killed worker leaves a trace; ``None`` for none."""
        await self._ask(partial(self._memory.save, start))
        self._start = start

    async def _wait_on_stream(self, start: TaskStart, stream: AsyncWorkflowRunStream) -> None:
        starter, defers = self._starter, self._arguments.deferrable
        start = replace(start, was_accepted=True, search=starter.known(start.search))
        try:
            run_id = await starter.wait_until_named(stream, start.search, SECONDS_BEFORE_QUEUED)
            if run_id is None:
                await self._keep(start)
                self._log.info(
                    "Dify has accepted the start and named no run yet: the workflow run of user %r is queued.",
                    start.user,
                )
                seconds = SECONDS_BEFORE_DEFERRAL if defers else self.deadline.left
                run_id = await starter.wait_until_named(stream, start.search, seconds)
        except DifyWorkflowRunUncertain as error:
            await self._wait_in_log(start, error)
            return
        except DifyError:
            # Dify rejected it.
            await self._keep(None)
            raise
        if run_id is not None:
            # The last two stay unknown where the log named the run.
            await self._remember(replace(start, workflow_run_id=run_id, task_id=stream.task_id or None))
            await self._ask(partial(self._xcoms.push_link, stream.app_id))
            self._log.info("Dify started workflow run %s for user %r.", run_id, start.user)
        elif defers:
            self._log.info("Leaving the wait for the queued run to the triggerer.")
        else:
            raise starter.still_queued(start.user)

    async def _wait_in_log(self, start: TaskStart, error: DifyWorkflowRunUncertain) -> None:
        """Look for the run of a start that broke off; a deferrable task leaves that to the triggerer soon."""
        self._log.warning("%s", error)
        await self._keep(start)
        starter = self._starter
        is_queued = start.was_accepted and starter.may_be_queued
        defers = is_queued and self._arguments.deferrable
        seconds = self.deadline.left if is_queued else self._arguments.wait.not_found_grace
        seconds = min(seconds, SECONDS_BEFORE_DEFERRAL) if defers else seconds
        if await self._search(start, error, seconds) or defers:
            return
        if not is_queued and self._arguments.restart_lost_runs and starter.log_shows_no_run:
            await self._keep(None)
            raise DifyConnectionError(f"{error} restart_lost_runs is set: a retry starts another run.") from error
        raise error

    async def _search(
        self, start: TaskStart, error: DifyError, seconds: float, *, patience_seconds: float = 0.0
    ) -> bool:
        """Look for the run of a start in Dify's log, and return whether this try continues it."""
        run_id = await self._starter.search_run(start.search, error, seconds, patience_seconds=patience_seconds)
        if run_id is not None:
            await self._remember(replace(start, workflow_run_id=run_id, try_number=self._try_number))
        return run_id is not None

    async def _remember(self, start: TaskStart) -> None:
        if self._starter.stream is not None and not self._starter.stream.is_named:
            # It was found in the log: the stream that should have named it is of no more use.
            self._starter.close()
            self._starter.stream = None
        self._start = start
        await self._ask(partial(self._push, start))

    async def _try_to_remember(self, start: TaskStart) -> bool:
        """Let Airflow keep a start for the retry within seconds, and return whether it does."""
        try:
            await asyncio.wait_for(self._ask(partial(self._memory.save, start)), SECONDS_AFTER_KILL)
        except Exception as error:
            # Of many types: the task's process talks to Airflow's API server, which may be why it is killed.
            self._log.debug("Airflow's task state could not be written: %r", error)
            return False
        return self._memory.is_kept

    # --- the end of a try that nobody waits for any more

    async def _stop_if_nobody_waits(self, error: Exception) -> None:
        """Stop the run of a try that failed for good; one that a retry will continue is left alone."""
        has_failed = isinstance(error, DifyWorkflowRunFailed) and not isinstance(error, DifyWorkflowRunTimeout)
        is_final = isinstance(error, AirflowFailException) or not self._will_be_retried
        if is_final and not (self._run_is_over or has_failed):
            await self._stop()

    async def _stop_after_kill(self) -> None:
        """Stop the run of a task that was killed, also one whose start is under way."""
        stream = self._starter.stream
        if stream is not None and self._start is not None:
            if not stream.is_named:
                with contextlib.suppress(DifyError):
                    await stream.wait_until_named(SECONDS_AFTER_KILL)
            if stream.is_named and self._start.workflow_run_id is None:
                self._start = replace(self._start, workflow_run_id=stream.workflow_run_id, task_id=stream.task_id)
        if self._start is None or self._run_is_over or self._starter.ended_run is not None:
            return
        is_recorded = is_server_from(self._client.server_version, (1, 16))
        if self._will_be_retried and not is_recorded and not await self._try_to_remember(self._start):
            # Neither Airflow nor this Dify would remember the stop, and the retry would wait for a stopped run.
            self._log.info("Workflow run %s keeps running for the retry of this task.", self._start.workflow_run_id)
            return
        await self._stop()

    async def _stop(self) -> None:
        """Ask Dify to stop the run, and log what came of it."""
        start = self._start
        if not self._arguments.stop_on_failure or start is None or start.stop_was_asked:
            return
        self._client.deadline = time.time() + STOP_TIMEOUT
        try:
            report = await stop_start(self._client, start)
        except Exception as error:
            # Whatever it is, the task ends for another reason, which is the one to be told.
            why = f"The workflow run of user {start.user!r} could not be stopped and keeps running: "
            report = StopReport(False, why + reason_of(error, ()), True)
        (self._log.warning if report.is_warning else self._log.info)("%s", report.message)
        if report.was_asked:
            self._start = replace(start, stop_was_asked=True)
            await self._try_to_remember(self._start)
