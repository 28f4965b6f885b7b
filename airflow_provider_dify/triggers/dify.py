"""Wait on a Dify workflow run on the triggerer."""

from __future__ import annotations

import asyncio
import random
import time
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from airflow.triggers.base import BaseTrigger, TriggerEvent

from airflow_provider_dify.airflow_versions import TRIGGER_TIMEOUT_MARGIN, pushable
from airflow_provider_dify.connection import MAX_RETRY_DELAY
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunNotFound
from airflow_provider_dify.waiting import STOP_ASKED, RunWait, WaitEnd, WaitPolicy, spread
from airflow_provider_dify.workflow_run import Outcome, WorkflowRun, canonical_workflow_run_id

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.connection import DifyConnection


class DifyWorkflowRunTrigger(BaseTrigger):
    """
    Poll a Dify workflow run until the wait is over, and tell how it ended in one small event.

    The event's payload holds ``workflow_run_id``, ``status``, ``end`` (a
    :class:`airflow_provider_dify.waiting.WaitEnd`), ``message`` and, where the wait failed, ``error``. It never holds
    outputs: Airflow logs payloads and keeps them in its database. The worker reads the finished run once more.

    Failed polls follow each other at 1, 2, 4, ... seconds (at least the interval), or as the server's ``Retry-After``
    asks, up to 60 seconds.

    :param workflow_run_id: the run's UUID.
    :param dify_conn_id: the Airflow connection.
    :param poll_interval: seconds between polls.
    :param deadline: epoch seconds at which the wait gives up; wall-clock time, because a trigger may go on in another
        triggerer. ``None`` takes it from the task, where the task started on the triggerer.
    :param first_poll: epoch seconds of the wait's first poll, from which ``not_found_grace`` counts; now by default.
    :param fail_on_partial_success: as for the sensor.
    :param not_found_grace: as for the sensor, in seconds.
    :param run_timeout: as for the sensor, in seconds.
    :param max_consecutive_failures: as for the sensor; ``None`` for any number.
    :param exponential_backoff: as for the sensor.
    :param max_wait: as for the sensor, in seconds.
    :param end_from_trigger: end the task here when the run succeeded, with its outputs as XComs.
    :param do_xcom_push: whether the task pushes XComs; only looked at with ``end_from_trigger``.
    :param multiple_outputs: whether each output is an XCom of its own; only looked at with ``end_from_trigger``.
    :param stop_task_id: Dify's id of the task to stop if a user ends the waiting task (Airflow 3.3 and later);
        ``None`` for a run that goes on.
    :param stop_user: the ``user`` that started the run; needed to stop it.
    """

    # Seconds after the first failed poll; doubled with each further one.
    retry_delay = 1.0
    # Seconds that the templates of a task that starts here may take.
    render_timeout = 60.0

    def __init__(
        self,
        workflow_run_id: str,
        dify_conn_id: str = "dify_default",
        poll_interval: float = 10.0,
        deadline: float | None = None,
        first_poll: float | None = None,
        fail_on_partial_success: bool = False,
        not_found_grace: float = 0.0,
        run_timeout: float | None = None,
        max_consecutive_failures: int | None = 5,
        exponential_backoff: bool = False,
        max_wait: float | None = None,
        end_from_trigger: bool = False,
        do_xcom_push: bool = True,
        multiple_outputs: bool = True,
        stop_task_id: str | None = None,
        stop_user: str | None = None,
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.workflow_run_id = workflow_run_id
        self.dify_conn_id = dify_conn_id
        self.poll_interval = poll_interval
        self.deadline = deadline
        self.first_poll = first_poll
        self.fail_on_partial_success = fail_on_partial_success
        self.not_found_grace = not_found_grace
        self.run_timeout = run_timeout
        self.max_consecutive_failures = max_consecutive_failures
        self.exponential_backoff = exponential_backoff
        self.max_wait = max_wait
        self.end_from_trigger = end_from_trigger
        self.do_xcom_push = do_xcom_push
        self.multiple_outputs = multiple_outputs
        self.stop_task_id = stop_task_id
        self.stop_user = stop_user
        self._render_context: Context | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Give the class and its arguments: text, numbers, booleans and null only, and no secret."""
        return (
            "airflow_provider_dify.triggers.dify.DifyWorkflowRunTrigger",
            {
                "workflow_run_id": self.workflow_run_id,
                "dify_conn_id": self.dify_conn_id,
                "poll_interval": self.poll_interval,
                "deadline": self.deadline,
                "first_poll": self.first_poll,
                "fail_on_partial_success": self.fail_on_partial_success,
                "not_found_grace": self.not_found_grace,
                "run_timeout": self.run_timeout,
                "max_consecutive_failures": self.max_consecutive_failures,
                "exponential_backoff": self.exponential_backoff,
                "max_wait": self.max_wait,
                "end_from_trigger": self.end_from_trigger,
                "do_xcom_push": self.do_xcom_push,
                "multiple_outputs": self.multiple_outputs,
                "stop_task_id": self.stop_task_id,
                "stop_user": self.stop_user,
            },
        )

    def render_template_fields(self, context: Context, jinja_env: Any = None) -> None:
        """
        Keep what a task that starts on the triggerer is rendered with (Airflow 3.3 and later).

        Airflow calls this before :meth:`run`, with no limit of time. :meth:`run` renders, within ``render_timeout``.
        """
        self._render_context = context

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Poll until the wait is over, and yield its one event."""
        try:
            if self._render_context is not None:
                self._render_templates(self._render_context)
            event = await self._wait()
        except DifyError as error:
            event = self._event(WaitEnd.FAILED, str(error), error=error)
        except Exception as error:
            # An event rather than a crash, of which the task's log would only say "Trigger failure".
            self.log.exception("The wait on Dify workflow run %s broke.", self.workflow_run_id)
            reason = f"The wait on Dify workflow run {self.workflow_run_id} broke: {type(error).__name__}: {error}"
            event = self._event(WaitEnd.FAILED, reason, error=DifyError(reason))
        yield event

    async def on_kill(self) -> None:
        """Ask Dify to stop the run, when a user ends the waiting task (Airflow 3.3 and later)."""
        if self.stop_task_id is None or self.stop_user is None:
            return
        hook_type = (await asyncio.to_thread(_load_client)).DifyAsyncHook
        async with hook_type(self.dify_conn_id) as hook:
            await hook.stop_workflow_task(self.stop_task_id, self.stop_user)
        self.log.info(STOP_ASKED, self.workflow_run_id)

    def _render_templates(self, context: Context) -> None:
        import anyio  # Airflow's triggerer uses it, too, wherever it renders.

        deadline = self._deadline()
        limit = self.render_timeout if deadline is None else min(self.render_timeout, max(0.0, deadline - time.time()))
        # There is no await to see, but Airflow (by greenback) awaits the answers that a template asks for.
        with anyio.move_on_after(limit) as scope:  # noqa: ASYNC100
            try:
                super().render_template_fields(context)
            except Exception as error:
                raise DifyError(
                    f"The sensor's templates could not be rendered on the triggerer: {type(error).__name__}: {error}"
                ) from error
        if scope.cancelled_caught:
            raise DifyError(
                f"The sensor's templates got no answer from Airflow on the triggerer for {limit:.0f} seconds."
            )

    async def _wait(self) -> TriggerEvent:
        wait = RunWait(
            # As in every other mode, a wrong id fails before any request.
            canonical_workflow_run_id(self.workflow_run_id),
            WaitPolicy(
                fail_on_partial_success=self.fail_on_partial_success,
                not_found_grace=self.not_found_grace,
                run_timeout=self.run_timeout,
                max_consecutive_failures=self.max_consecutive_failures,
            ),
            log=self.log,
            first_poll=None if self.first_poll is None else datetime.fromtimestamp(self.first_poll, timezone.utc),
        )
        deadline = self._deadline()
        # Imported in a thread, because the HTTP client takes a while to load and others run on this loop.
        hook_type = (await asyncio.to_thread(_load_client)).DifyAsyncHook
        loop = asyncio.get_running_loop()
        polls = 0
        async with hook_type(self.dify_conn_id) as hook:
            # Triggers that start together, after a restart say, must not poll together for ever.
            due = loop.time() + random.uniform(0, self.poll_interval)  # noqa: S311
            while True:
                await self._sleep_until(due, deadline)
                asked_to_wait = 0.0
                try:
                    run = await hook.get_workflow_run(wait.workflow_run_id)
                except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
                    wait.put_up_with(error)
                    asked_to_wait = self._delay_after(error, wait.consecutive_failures)
                else:
                    verdict = wait.look_at(run)
                    if verdict.outcome is not Outcome.WAIT:
                        if (
                            verdict.outcome is Outcome.DONE
                            and self.end_from_trigger
                            and await self._push(run, hook.connection)
                        ):
                            return _task_success()
                        # A failure is left to a worker: there it has a log, callbacks and no retry.
                        return self._event(WaitEnd.RUN_IS_OVER, verdict.reason, status=run.status)
                if deadline is not None and time.time() >= deadline:
                    return self._event(WaitEnd.TIMED_OUT, wait.last_seen(), status=wait.status)
                polls += 1
                interval = spread(
                    self.poll_interval, polls, exponential_backoff=self.exponential_backoff, max_wait=self.max_wait
                )
                # From when this poll was due, not from when it was answered: so the polls keep their rhythm.
                due = max(due + interval, loop.time() + asked_to_wait)

    async def _sleep_until(self, due: float, deadline: float | None) -> None:
        delay = due - asyncio.get_running_loop().time()
        if deadline is not None:
            # The last poll is at the deadline, as a poking sensor polls before it times out.
            delay = min(delay, deadline - time.time())
        await asyncio.sleep(max(0.0, delay))

    def _delay_after(self, error: DifyError, failures: int) -> float:
        """Say how long not to poll after a failed poll, so that short intervals don't use up the allowance at once."""
        if not isinstance(error, DifyConnectionError):
            return 0.0
        delay = self.retry_delay * 2.0 ** (min(failures, 16) - 1) * random.uniform(1, 1.5)  # noqa: S311
        return min(max(delay, error.retry_after or 0.0), MAX_RETRY_DELAY)

    def _deadline(self) -> float | None:
        if self.deadline is not None:
            return self.deadline
        # Set by the triggerer (Airflow 3.3) from what the sensor said when it let the task start here.
        timeout_after = getattr(self, "timeout_after", None)
        if not isinstance(timeout_after, datetime):
            return None
        if timeout_after.tzinfo is None:
            timeout_after = timeout_after.replace(tzinfo=timezone.utc)
        return timeout_after.timestamp() - self._margin()

    def _margin(self) -> float:
        """Return by how many seconds Airflow's limit for a task that started here comes after the sensor's timeout."""
        task: Any = self.task
        limit = getattr(getattr(task, "start_trigger_args", None), "timeout", None)
        if limit is None or task.execution_timeout is None or task.execution_timeout > limit:
            return TRIGGER_TIMEOUT_MARGIN
        # Airflow's limit is the execution_timeout, which may come before the sensor's.
        return float(TRIGGER_TIMEOUT_MARGIN - (limit - task.execution_timeout).total_seconds())

    async def _push(self, run: WorkflowRun, connection: DifyConnection) -> bool:
        """
        Push the task's XComs as a worker would, so that the task can end here.

        Not as the ending event's own ``xcoms``: those Airflow (3.0 to 3.3) writes as JSON text within JSON, so that the
        next task gets a text where it should get a dict.

        :return: whether that worked; else a worker has to end the task.
        """
        if not self.do_xcom_push:
            return True
        from airflow.providers.common.compat.sdk import XCom
        from asgiref.sync import sync_to_async

        from airflow_provider_dify.links.dify import run_log_xcoms

        ti: Any = self.task_instance
        try:
            xcoms = {**run.xcoms(self.multiple_outputs), **run_log_xcoms(connection, run.app_id)}
            for key, value in pushable(xcoms).items():
                await sync_to_async(XCom.set)(
                    key=key,
                    value=value,
                    dag_id=ti.dag_id,
                    task_id=ti.task_id,
                    run_id=ti.run_id,
                    map_index=ti.map_index,
                )
        except Exception:
            self.log.warning(
                "The outputs of Dify workflow run %s could not be pushed from the triggerer; a worker will do it.",
                run.id,
                exc_info=True,
            )
            return False
        return True

    def _event(
        self, end: WaitEnd, message: str, *, status: object = None, error: DifyError | None = None
    ) -> TriggerEvent:
        return TriggerEvent(  # type: ignore[no-untyped-call]
            {
                "workflow_run_id": str(self.workflow_run_id),
                "status": None if status is None else str(status),
                "end": end.value,
                "message": message,
                "error": error.to_event() if error else None,
            }
        )


def _task_success() -> TriggerEvent:
    from airflow.triggers.base import TaskSuccessEvent  # not in every supported Airflow

    return TaskSuccessEvent()


def _load_client() -> Any:
    from airflow_provider_dify.hooks import dify_async

    return dify_async
