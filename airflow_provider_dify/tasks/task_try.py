"""One try of the operator while it runs: its start, its clock, and what of it is known where."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from airflow_provider_dify.api.calls import Steps
from airflow_provider_dify.api.http_response import reason_of
from airflow_provider_dify.api.models import WorkflowRun, is_server_from
from airflow_provider_dify.api.session import call_within
from airflow_provider_dify.api.started_run import StartedRun, wait_until_named
from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyError,
    DifyTaskKilled,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.clock import TaskClock
from airflow_provider_dify.runs.following import Follower
from airflow_provider_dify.runs.log import RepeatedLook, known_runs
from airflow_provider_dify.runs.stopping import STOP_TIMEOUT, StopReport
from airflow_provider_dify.runs.verdict import Outcome, judge
from airflow_provider_dify.runs.whole_run import still_queued
from airflow_provider_dify.tasks.start import (
    SECONDS_FOR_LOG,
    StartMemory,
    StartSettings,
    TaskStart,
    earliest_start,
    find_earlier_start,
    new_start,
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
# How long a killed task waits for a start that is under way, so that it can be stopped.
SECONDS_AFTER_KILL = 2.0


class RunningTask:
    """
    One try of the operator while it runs.

    :param settings: the operator's arguments.
    :param context: the running task's context.
    :param hook: the hook, which sends nothing again by itself.
    :param clock: the try's deadline.
    :param log: the task's log.
    :param xcoms: the task's XComs.
    :ivar run_is_over: whether the run was seen to be over, so that there is nothing to stop or to wait for.
    """

    def __init__(
        self,
        settings: StartSettings,
        context: Context,
        hook: DifyHook,
        clock: TaskClock,
        log: Logger,
        xcoms: TaskXComs,
    ) -> None:
        self.context = context
        self.clock = clock
        self.xcoms = xcoms
        self.follower = Follower(hook, clock, log, settings.poll_interval, not_found_grace=settings.not_found_grace)
        self.run_is_over = False
        self._settings = settings
        self._hook = hook
        self._log = log
        self._memory = StartMemory(context)
        self._start: TaskStart | None = None
        self._stop_was_asked = False
        self._is_to_be_stopped = False

    @property
    def stream(self) -> StartedRun | None:
        """The start that this try has sent, and its run's events; ``None`` until then."""
        return self.follower.stream

    @property
    def task_start(self) -> TaskStart:
        """The start, once there is one."""
        assert self._start is not None  # noqa: S101
        return self._start

    @property
    def named_run_id(self) -> str:
        """The run's id, once it is named."""
        return str(self.task_start.workflow_run_id)

    def close(self) -> None:
        """Hang up; the run goes on."""
        if self.stream is not None:
            self.stream.close()

    def start(self) -> None:
        """
        Start a run, or find the one that an earlier try started. It is named then, unless the task is to defer.

        :raises DifyError: as :class:`~airflow_provider_dify.operators.dify.DifyRunWorkflowOperator` does.
        """
        earlier = self._find_earlier_start()
        if earlier is None:
            self._start_new_run()

    def resume(self, data: Mapping[str, Any] | None, event: Any) -> None:
        """
        Take up the start that the task deferred with.

        :param data: the start, as it was serialized; ``None`` where Airflow lost it, and for ``dag.test()``, which
            returns nothing but the event to a resumed task.
        :param event: the trigger's event, which names a run that was queued when the task deferred.
        """
        ti: Any = self.context["ti"]
        start = TaskStart.deserialize(data) or self._memory.load()
        if start is None or start.try_number != ti.try_number:
            self._start = new_start(ti, self._settings.user, self._settings.inputs, (), earliest_start(self.context))
            # The event names the run, but not the task id that a stop takes.
            self._take_ids_from_xcoms(ti)
            start = self.task_start
        named = event.get("workflow_run_id") if isinstance(event, dict) else None
        is_new = start.workflow_run_id is None and bool(named)
        self._start = replace(start, workflow_run_id=named) if is_new else start
        if is_new:
            self._remember(self._start)

    def remember_end(self) -> bool:
        """
        Let the retry know that the run is over although its record says that it goes on.

        :return: whether a retry starts another run; before Airflow 3.3 it would take up this one.
        """
        is_kept = self._try_to_remember(replace(self.task_start, has_ended=True))
        return is_kept or not self.follower.record_is_open

    def stop(self) -> None:
        """Ask Dify to stop the run, if it is named, and log what came of it."""
        start = self._start
        if not self._settings.stop_on_failure or self._stop_was_asked or start is None:
            return
        try:
            # A session and limits of its own: this may be a signal's handler, in the middle of another request.
            with DifyHook(self._hook.dify_conn_id, timeout=STOP_TIMEOUT, retry_limit=0) as hook:
                hook._connection = replace(self._hook.connection, timeout=STOP_TIMEOUT)
                report: StopReport = hook.run_steps(stop_start(start, hook))
        except Exception as error:
            # Whatever it is, the task ends for another reason, which is the one to be told.
            why = f"The workflow run of user {start.user!r} could not be stopped and goes on: {reason_of(error, ())}"
            report = StopReport(False, why, True)
        (self._log.warning if report.is_warning else self._log.info)("%s", report.message)
        if report.was_asked:
            self._stop_was_asked = True
            self._start = replace(start, stop_was_asked=True)
            self._try_to_remember(self._start)

    def stop_after_kill(self) -> None:
        """Stop the run of a task that was killed, also one whose start is under way."""
        if self.stream is not None and not self.stream.is_named:
            with contextlib.suppress(DifyError):
                self._hook.run_steps(wait_until_named(self.stream, SECONDS_AFTER_KILL))
            if self.stream.is_named and self._start is not None:
                # Only here: this may be a signal's handler, in the middle of a message to Airflow.
                ids = {"workflow_run_id": self.stream.workflow_run_id, "task_id": self.stream.task_id}
                self._start = replace(self._start, **ids)
        if self._start is None or self.run_is_over or self.follower.ended_run is not None:
            return
        ti: Any = self.context["ti"]
        will_be_retried = ti.try_number <= (ti.max_tries or 0)
        is_recorded = is_server_from(self._hook.server_version, (1, 16))
        if will_be_retried and not is_recorded and not self._try_to_remember(self._start):
            # Neither Airflow nor this Dify would remember the stop, and the retry would wait for a stopped run.
            self._log.info("Workflow run %s goes on for the retry of this task.", self._start.workflow_run_id)
            self._is_to_be_stopped = self._memory.is_kept
            return
        self.stop()

    def stop_after_message(self) -> None:
        """
        Stop the run of a killed task that could not be stopped when the signal came.

        The signal may have come in the middle of a message to Airflow, so that no other could be sent. Airflow 3 lets
        the task go on after the signal's handler, and that message is over now.
        """
        if self._is_to_be_stopped:
            self._is_to_be_stopped = False
            self.stop_after_kill()

    def _try_to_remember(self, start: TaskStart) -> bool:
        """Let Airflow keep a start for the retry within a second, and return whether it does."""
        try:
            # In a thread: the task itself may be in the middle of a message to Airflow, which would never end.
            call_within(1.0, lambda: self._memory.save(start), lambda: None)
        except Exception as error:
            # Of many types: the task's process talks to Airflow's API server, which may be why it is killed.
            self._log.debug("Airflow's task state could not be written: %r", error)
            return False
        return self._memory.is_kept

    def _find_earlier_start(self) -> TaskStart | None:
        try:
            found = self._look_through_failures(lambda: find_earlier_start(self.context, self._settings))
        except DifyConnectionError as error:
            # A new one, whose attributes say nothing of a start.
            raise DifyConnectionError(
                f"{error} So this try can't tell whether a run of an earlier one goes on, and started none."
            ) from None
        if found is None:
            return None
        start, run = found
        return self._continue(start, run) if run is not None else self._continue_unnamed(start)

    def _look_through_failures(self, look: Callable[[], Steps[T]]) -> T:
        looks = RepeatedLook(self.clock, self._log, self._settings.poll_interval)
        return self._hook.run_steps(looks.through_failures(look, self._settings.max_consecutive_failures))

    def _continue(self, start: TaskStart, run: WorkflowRun) -> TaskStart:
        verdict = judge(run, now=datetime.now(timezone.utc))
        self.run_is_over = verdict.outcome is Outcome.DONE
        self._log.info("Continuing the run that an earlier try started. %s", verdict.reason)
        self._remember(replace(start, try_number=self.context["ti"].try_number))
        self.xcoms.push_link(run.app_id)
        return start

    def _continue_unnamed(self, start: TaskStart) -> TaskStart | None:
        """Wait for the run of a start that was under way when an earlier try was killed."""
        self._log.info("An earlier try was ended while its start was under way; looking for its run.")
        self._start = start
        error = DifyWorkflowRunUncertain(
            f"An earlier try was ended while its start was under way, and Dify's log does not show a run of user "
            f"{start.user!r}: it may be queued, and run later. Look for the user in the app's log in Dify's console, "
            "then clear the task to start a new run.",
            user=start.user,
        )
        seconds = self.clock.left if start.was_accepted else self._settings.not_found_grace
        if self._settings.deferrable and start.was_accepted:
            return start
        steps = self.follower.search_run(start.search, error, seconds, patience=SECONDS_FOR_LOG)
        run_id = self._hook.run_steps(steps)
        if run_id is not None:
            self._remember(replace(start, workflow_run_id=run_id, try_number=self.context["ti"].try_number))
            return self._start
        if self.follower.last_look_failed:
            # Airflow remembers the start, so the next try looks again.
            raise DifyConnectionError(f"Dify's log could not be read. {error}")
        if start.was_accepted or not self._may_start_again():
            raise error
        self._log.warning("Dify's log shows no run of the earlier try's start; starting a new run.")
        self._start = None
        return None

    def _may_start_again(self) -> bool:
        """Return whether a start that Dify did not accept, and whose run is not in its log, may be sent again."""
        if not self.follower.may_be_queued():
            # This server shows each run at once.
            return True
        return self._settings.restart_lost_runs and self.follower.log_shows_no_run

    def _start_new_run(self) -> None:
        settings = self._settings
        ti: Any = self.context["ti"]
        if settings.workflow_id is None:
            # The form that Dify shows is the current version's.
            self._hook.run_steps(self.follower.check_inputs(settings.inputs))
        before = self._hook.run_steps(known_runs(settings.user)) if settings.user is not None else ()
        start = new_start(ti, settings.user, settings.inputs, before, time.time())
        if self._hook.server_version:
            self._log.info("Dify %s at %s.", self._hook.server_version, self._hook.connection.base_url)
        self.follower.before_send = lambda: self._keep(start)
        self.follower.after_refusal = lambda: self._keep(None)
        try:
            stream = self._hook.run_steps(self.follower.send_start(settings.inputs, start.user, settings.workflow_id))
        except DifyWorkflowRunUncertain as error:
            self._wait_in_log(start, error)
            return
        except BaseException as error:
            if isinstance(error, Exception) and not isinstance(error, DifyTaskKilled):
                # Nothing was started.
                self._keep(None)
            raise
        self._wait_on_stream(start, stream)

    def _keep(self, start: TaskStart | None) -> None:
        """Let Airflow keep a start before it is sent, so that a killed worker leaves a trace; ``None`` for none."""
        self._memory.save(start)
        self._start = start

    def _wait_until_named(self, stream: StartedRun, start: TaskStart, seconds: float) -> str | None:
        return self._hook.run_steps(self.follower.wait_until_named(stream, start.search, seconds))

    def _wait_on_stream(self, start: TaskStart, stream: StartedRun) -> None:
        try:
            run_id = self._wait_until_named(stream, start, SECONDS_BEFORE_QUEUED)
            if run_id is None:
                start = replace(start, was_accepted=True)
                self._keep(start)
                self._log.info(
                    "Dify has accepted the start and named no run yet: the workflow run of user %r is queued.",
                    start.user,
                )
                seconds = SECONDS_BEFORE_DEFERRAL if self._settings.deferrable else self.clock.left
                run_id = self._wait_until_named(stream, start, seconds)
        except DifyWorkflowRunUncertain as error:
            self._wait_in_log(replace(start, was_accepted=True), error)
            return
        except DifyTaskKilled:
            self.stop_after_kill()
            raise
        except DifyError:
            # Dify rejected it.
            self._keep(None)
            raise
        if run_id is None:
            self._on_still_queued(start)
        elif stream.is_named:
            self._take_named_run(stream)
        else:
            self._remember(replace(start, workflow_run_id=run_id))

    def _take_named_run(self, stream: StartedRun) -> None:
        if self._start is None or self._start.workflow_run_id is not None:
            return
        self._remember(replace(self._start, workflow_run_id=stream.workflow_run_id, task_id=stream.task_id))
        self.xcoms.push_link(stream.app_id)
        self._log.info("Dify started workflow run %s for user %r.", stream.workflow_run_id, self._start.user)

    def _wait_in_log(self, start: TaskStart, error: DifyWorkflowRunUncertain) -> None:
        """Look for the run of a start that broke off; a deferrable task leaves that to the triggerer soon."""
        self._log.warning("%s", error)
        self._keep(start)
        is_queued = start.was_accepted and self.follower.may_be_queued()
        defers = is_queued and self._settings.deferrable
        seconds = self.clock.left if is_queued else self._settings.not_found_grace
        if defers:
            seconds = min(seconds, SECONDS_BEFORE_DEFERRAL)
        run_id = self._hook.run_steps(self.follower.search_run(start.search, error, seconds))
        if run_id is not None:
            self._remember(replace(start, workflow_run_id=run_id))
        elif not defers:
            self._raise_lost(error, is_queued)

    def _raise_lost(self, error: DifyWorkflowRunUncertain, is_queued: bool) -> NoReturn:
        """End a try whose run was not found: for good, or with a retry that may start another one."""
        if is_queued or not (self._settings.restart_lost_runs and self.follower.log_shows_no_run):
            raise error
        self._keep(None)
        raise DifyConnectionError(f"{error} restart_lost_runs is set: a retry starts another run.") from error

    def _on_still_queued(self, start: TaskStart) -> None:
        if self._settings.deferrable:
            self._log.info("Leaving the wait for the queued run to the triggerer.")
            return
        raise still_queued(self.follower, start.user)

    def _remember(self, start: TaskStart) -> None:
        """Store the run everywhere at once, so that no crash loses it."""
        if self.stream is not None and not self.stream.is_named:
            # It was found in the log: the stream that should have named it is of no more use.
            self.stream.close()
            self.follower.stream = None
        self._start = start
        self._memory.save(start)
        self.xcoms.push_ids(str(start.workflow_run_id), start.task_id)

    def _take_ids_from_xcoms(self, ti: Any) -> None:
        run_id, task_id = (
            ti.xcom_pull(task_ids=ti.task_id, key=key, map_indexes=ti.map_index)
            for key in ("workflow_run_id", "task_id")
        )
        if run_id:
            self._start = replace(self.task_start, workflow_run_id=str(run_id), task_id=task_id)
