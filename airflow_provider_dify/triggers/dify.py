# SPDX-License-Identifier: Apache-2.0
"""Wait on a Dify workflow run on the triggerer."""

from __future__ import annotations

import asyncio
import math
import random
import time
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import conf
from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dify.airflow_versions import KILLS_WHAT_IT_HANDS_OVER, TRIGGER_TIMEOUT_MARGIN
from airflow_provider_dify.api.calls import parse_workflow_run_id
from airflow_provider_dify.api.models import known_fields, one_line
from airflow_provider_dify.exceptions import (
    ARGUMENT_SECTION,
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.log import RunSearch, delay_after, find_run, looking_again, until
from airflow_provider_dify.runs.stopping import StopReport, stop_queued, stop_run
from airflow_provider_dify.runs.waiting import (
    LIFE_INTERVAL,
    Deadline,
    Outcome,
    RunWait,
    TriggerWait,
    WaitEnd,
)
from airflow_provider_dify.runs.wanted import LatestRunSearch
from airflow_provider_dify.tasks.xcoms import TriggerXComs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine

    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger

    from airflow_provider_dify.hooks.dify_async import DifyAsyncHook


class DifyWorkflowRunTrigger(BaseTrigger):
    """
    Poll a Dify workflow run until the wait is over, and send how it ended in one small event.

    The event's payload holds ``workflow_run_id``, ``status``, ``end`` (a
    :class:`~airflow_provider_dify.runs.waiting.WaitEnd`), ``message`` and, where the wait failed, ``error``. It never
    holds outputs: Airflow logs payloads and keeps them in its database. The worker reads the finished run once more.

    A run that is still queued at Dify has no id. The trigger looks for it in Dify's log first.

    Failed polls follow each other at 1, 2, 4, ... seconds (at least the interval), up to 60 seconds, or as late as the
    server's ``Retry-After`` asks.

    :param workflow_run_id: the run's UUID; ``None`` for a run that ``search`` describes.
    :param dify_conn_id: the Airflow connection.
    :param arguments: the fields of :class:`~airflow_provider_dify.runs.waiting.TriggerWait`.
    """

    # Seconds after the first failed poll; doubled with each further one.
    retry_delay = 1.0
    # Seconds that the templates of a task that starts here may take.
    render_timeout = 60.0
    # Seconds from the trigger's start to an event that resumes its task. Airflow may see the end of the worker's
    # process 5 seconds late ([workers] min_heartbeat_interval). A task that is queued again before that counts as dead,
    # and fails without a message (3.3.2).
    resume_delay = 10.0

    def __init__(
        self, workflow_run_id: str | None = None, dify_conn_id: str = "dify_default", **arguments: Any
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.workflow_run_id = workflow_run_id
        self.dify_conn_id = dify_conn_id
        # Another version of this package may have stored them.
        self.wait = TriggerWait(**known_fields(TriggerWait, arguments))
        self._render_context: Context | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments: JSON-ready values only, and no secret."""
        return (
            f"{type(self).__module__}.{type(self).__name__}",
            {"workflow_run_id": self.workflow_run_id, "dify_conn_id": self.dify_conn_id, **self.wait.serialize()},
        )

    def render_template_fields(self, context: Context, jinja_env: Any = None) -> None:
        """
        Keep what a task that starts on the triggerer is rendered with (Airflow 3.3 and later).

        Airflow calls this before :meth:`run`, with no limit of time. :meth:`run` renders, within ``render_timeout``.
        """
        self._render_context = context

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Poll until the wait is over, and yield its one event."""
        resumable = asyncio.get_running_loop().time() + self.resume_delay
        try:
            if self._render_context is not None:
                self._render_templates(self._render_context)
            event = await self._wait()
        except DifyError as error:
            event = self._event(WaitEnd.FAILED, str(error), error=error)
        except Exception as error:
            # An event rather than a crash, of which the task's log would only say "Trigger failure".
            self.log.exception("The wait for Dify workflow run %s broke.", self.workflow_run_id)
            reason = (
                f"The wait for Dify workflow run {self.workflow_run_id} broke: {type(error).__name__}: {error!s:.300}"
            )
            event = self._event(WaitEnd.FAILED, reason, error=DifyError(reason))
        if isinstance(event.payload, dict) and self._render_context is None:
            # The event resumes a task that a worker has deferred.
            await self._sleep_until(resumable, None)
        yield event

    async def on_kill(self) -> None:
        """Stop the run, when a user ends the waiting task (Airflow 3.3 and later)."""
        user = self.wait.stop_user
        if user is None:
            return
        timeout = conf.getfloat("triggerer", "on_kill_timeout", fallback=30.0)
        try:
            await run_shielded(self._stop(user), timeout)
        except asyncio.TimeoutError:
            run = self.workflow_run_id or f"of user {user!r}"
            self.log.warning(
                "Workflow run %s may keep running: [triggerer] on_kill_timeout of %g seconds is over.", run, timeout
            )

    async def _stop(self, user: str) -> None:
        if await is_waiting_elsewhere(getattr(self, "task_instance", None), self.log):
            return
        async with await self._hook() as hook:
            report: StopReport
            if self.workflow_run_id is None:
                report = await stop_queued(hook, RunSearch.deserialize(self.wait.search or {}), self.wait.stop_task_id)
            else:
                report = await stop_run(hook, self.workflow_run_id, self.wait.stop_task_id, user)
        (self.log.warning if report.is_warning else self.log.info)("%s", report.message)

    def _render_templates(self, context: Context) -> None:
        import anyio  # Airflow's triggerer uses it, too, wherever it renders.

        deadline = self._deadline()
        limit = self.render_timeout if deadline is None else min(self.render_timeout, max(0.0, deadline - time.time()))
        # There is no await to see, but Airflow (by greenback) awaits what a template asks for.
        with anyio.move_on_after(limit) as scope:  # noqa: ASYNC100
            try:
                super().render_template_fields(context)
            except Exception as error:
                raise DifyError(
                    f"{type(error).__name__}: {one_line(str(error))}: the sensor's templates could not be rendered on "
                    "the triggerer."
                ).explained_in(ARGUMENT_SECTION) from error
        if scope.cancelled_caught:
            raise DifyError(
                f"Airflow did not respond for {limit:.0f} seconds to what the sensor's templates ask for on the "
                "triggerer."
            ).explained_in(ARGUMENT_SECTION)

    async def _wait(self) -> TriggerEvent:
        if self.workflow_run_id is not None:
            # As in every other mode, a wrong id fails before any request.
            self.workflow_run_id = parse_workflow_run_id(self.workflow_run_id)
        deadline = self._deadline()
        async with await self._hook() as hook:
            if is_found := self.workflow_run_id is None:
                self.workflow_run_id = await self._find_run(hook, deadline)
            return await self._poll_until_over(hook, str(self.workflow_run_id), deadline, at_once=is_found)

    async def _hook(self) -> DifyAsyncHook:
        """Return the hook, imported in a thread: its HTTP client takes a while to load, and others run on this loop."""
        hook_type: type[DifyAsyncHook] = await asyncio.to_thread(_load_hook)
        return hook_type(self.dify_conn_id)

    async def _find_run(self, hook: DifyAsyncHook, deadline: float | None) -> str:
        """Look for a queued run in Dify's log, until it is there."""
        search = RunSearch.deserialize(self.wait.search or {})
        others: set[str] = set()
        try:
            run_id = await self._search(
                lambda: find_run(hook, search, others),
                deadline,
                f"The workflow run of user {search.user!r} is queued at Dify, or not in its log yet",
            )
        except DifyConnectionError as error:
            raise DifyWorkflowRunUncertain(
                f"{error} The log could not be read, so the run of user {search.user!r} was not found.",
                user=search.user,
            ) from None
        if run_id is None:
            raise DifyWorkflowRunUncertain(
                f"The operator's timeout is over, and Dify's log shows no run of user {search.user!r}: it may still be "
                "queued, and run later. Look for the user in the app's log in Dify's console.",
                user=search.user,
            )
        return run_id

    async def _search(self, find: Callable[[], Awaitable[str | None]], deadline: float | None, what: str) -> str | None:
        """Look for a run in Dify's log, until one is there (its id) or the time is over (``None``)."""
        began = time.time()
        next_line = 0.0

        async def look() -> str | None:
            nonlocal next_line
            run_id = await find()
            if run_id is not None:
                self.log.info("Dify's log names the run: workflow run %s.", run_id)
            elif time.time() >= next_line:
                next_line = time.time() + LIFE_INTERVAL
                self.log.info("%s; %.0f seconds in the triggerer.", what, time.time() - began)
            return run_id

        return await until(
            look,
            Deadline(math.inf if deadline is None else deadline, 0.0),
            looking_again(self.log, self.wait.max_consecutive_failures),
            interval_seconds=self.wait.poll_interval,
            first_seconds=self.wait.poll_interval,
        )

    async def _poll_until_over(
        self, hook: DifyAsyncHook, run_id: str, deadline: float | None, *, at_once: bool
    ) -> TriggerEvent:
        """Poll a run until the wait is over: at once if a search has found it, since it may have ended long ago."""
        first_poll = self.wait.first_poll
        wait = RunWait(
            run_id,
            self.wait,
            log=self.log,
            first_poll=None if first_poll is None else datetime.fromtimestamp(first_poll, timezone.utc),
            was_seen=self.wait.was_seen,
        )
        xcoms = TriggerXComs(getattr(self, "task_instance", None), self.wait, self.log)
        loop = asyncio.get_running_loop()
        polls = 0
        has_link = self.wait.has_link
        # Triggers that start together, after a restart say, must not poll together for ever.
        due = loop.time() + (0.0 if at_once else random.uniform(0, self.wait.poll_interval))  # noqa: S311
        while True:
            await self._sleep_until(due, deadline)
            delay = 0.0
            try:
                run = await hook.get_workflow_run(run_id)
            except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
                wait.on_failed_poll(error)
                delay = delay_after(error, wait.consecutive_failures, self.retry_delay)
            else:
                if wait.status is None and hook.address:
                    self.log.info("%s", hook.address)
                verdict = wait.on_poll(run)
                if not has_link:
                    await xcoms.push_link(run, hook.connection)
                    has_link = True
                if verdict.outcome is not Outcome.WAIT:
                    if verdict.outcome is Outcome.DONE and self.wait.end_from_trigger and await xcoms.push_outputs(run):
                        return _task_success()
                    # A failure is left to a worker: there it has a log, callbacks and no retry.
                    return self._event(WaitEnd.RUN_IS_OVER, verdict.reason, status=run.status)
            if deadline is not None and time.time() >= deadline:
                return self._event(WaitEnd.TIMED_OUT, wait.describe_last_status(), status=wait.status)
            polls += 1
            # From when this poll was due, not from when it ended: so the polls keep their rhythm.
            due = max(due + self.wait.interval_after(polls), loop.time() + delay)

    async def _sleep_until(self, due: float, deadline: float | None) -> None:
        delay = due - asyncio.get_running_loop().time()
        if deadline is not None:
            # The last poll is at the deadline, as a poking sensor polls before it times out.
            delay = min(delay, deadline - time.time())
        await asyncio.sleep(max(0.0, delay))

    def _deadline(self) -> float | None:
        if self.wait.deadline is not None:
            return self.wait.deadline
        # Set by the triggerer (Airflow 3.3) from what the sensor said when it let the task start here.
        timeout_after = getattr(self, "timeout_after", None)
        if not isinstance(timeout_after, datetime):
            return None
        if timeout_after.tzinfo is None:
            timeout_after = timeout_after.replace(tzinfo=timezone.utc)
        return timeout_after.timestamp() - self._margin()

    def _margin(self) -> float:
        """Return by how many seconds Airflow's limit for a task that started here comes after the end of the wait."""
        task: Any = self.task
        limit = getattr(getattr(task, "start_trigger_args", None), "timeout", None)
        if limit is None or task.execution_timeout is None or task.execution_timeout > limit:
            return TRIGGER_TIMEOUT_MARGIN
        # Airflow's limit is the execution_timeout, which may come before the sensor's timeout, and ends the wait then.
        return float(max(0.0, TRIGGER_TIMEOUT_MARGIN - (limit - task.execution_timeout).total_seconds()))

    def _event(
        self, end: WaitEnd, message: str, *, status: object = None, error: DifyError | None = None
    ) -> TriggerEvent:
        return TriggerEvent(  # type: ignore[no-untyped-call]
            {
                "workflow_run_id": None if self.workflow_run_id is None else str(self.workflow_run_id),
                "status": None if status is None else str(status),
                "end": end.value,
                "message": message,
                "error": error.to_event() if error else None,
            }
        )


def _task_success() -> TriggerEvent:
    from airflow.triggers.base import TaskSuccessEvent  # not in every supported Airflow

    return TaskSuccessEvent()


def _load_hook() -> type[DifyAsyncHook]:
    from airflow_provider_dify.hooks.dify_async import DifyAsyncHook

    return DifyAsyncHook


# An event loop keeps only weak references to its tasks.
_tasks: set[asyncio.Task[None]] = set()


async def run_shielded(work: Coroutine[Any, Any, None], timeout: float) -> None:
    """
    Run to its end what a trigger does in ``on_kill``; raises an asyncio.TimeoutError after ``timeout`` seconds. Airflow
    3.3 and 3.4.0b2 cancel a killed trigger again about every second, which ends a longer ``on_kill``. Before Python
    3.12 the second cancel also ends Airflow's own wait for ``on_kill``; the work goes on then, too.
    """
    task = asyncio.create_task(asyncio.wait_for(work, timeout))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    while not task.done():
        # The caller is cancelled; or the loop comes to its end, which has cancelled the task, too.
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


async def is_waiting_elsewhere(ti: Any, log: Logger) -> bool:
    """
    Return whether a task still waits, on another triggerer; ``False`` where Airflow doesn't say. Airflow 3.3 calls a
    trigger's ``on_kill`` also on a triggerer that was silent for so long (a minute under load, say) that another one
    has taken its triggers over.
    """
    if ti is None or not KILLS_WHAT_IT_HANDS_OVER:
        return False
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
    from asgiref.sync import sync_to_async

    task = {"dag_id": ti.dag_id, "task_ids": [ti.task_id], "run_ids": [ti.run_id], "map_index": ti.map_index}
    try:
        states = await sync_to_async(RuntimeTaskInstance.get_task_states)(**task)
    except Exception:
        log.warning("Airflow did not say whether the task still waits; its run is stopped.", exc_info=True)
        return False
    return "deferred" in states.get(ti.run_id, {}).values()


class DifyLatestWorkflowRunTrigger(DifyWorkflowRunTrigger):
    """
    Look until a run that fits has ended, and send one small event, as its base class does. The ``search`` of its
    arguments is what :meth:`~airflow_provider_dify.runs.wanted.LatestRunSearch.serialize` returns.
    """

    async def _wait(self) -> TriggerEvent:
        search = LatestRunSearch.deserialize(self.wait.search or {})
        deadline = self._deadline()
        async with await self._hook() as hook:
            run_id = await self._search(
                lambda: search.look(hook, time.time()), deadline, f"Waiting for {search.describe()}"
            )
            if run_id is None:
                return self._event(WaitEnd.TIMED_OUT, f"There was not {search.describe()}.")
            self.workflow_run_id = run_id
            return await self._poll_until_over(hook, run_id, deadline, at_once=True)
