# SPDX-License-Identifier: Apache-2.0
"""Start a Dify workflow run in a task, and wait for it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.common.compat.sdk import BaseOperator, conf

from airflow_provider_dify.airflow_versions import (
    CAN_RENDER_AFTER_EXECUTION,
    TRIGGER_TIMEOUT_MARGIN,
    context_of_ended_deferral,
    is_deferral_timeout,
)
from airflow_provider_dify.exceptions import (
    DifyError,
    DifyTaskKilled,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
    TaskErrors,
)
from airflow_provider_dify.links.dify import UI_COLOR, UI_FGCOLOR, DifyWorkflowRunLink
from airflow_provider_dify.runs.waiting import (
    Deadline,
    TriggerWait,
    WaitArguments,
    deferral_end,
    error_from_event,
    is_limited,
)
from airflow_provider_dify.tasks.arguments import parse_count, parse_end_from_trigger, parse_seconds
from airflow_provider_dify.tasks.xcoms import TaskXComs, has_link

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.hooks.dify import DifyHook
    from airflow_provider_dify.tasks.task_try import RunningTask

# How long a worker has at least to read a run that the triggerer saw end.
SECONDS_TO_READ = 60.0


class DifyRunWorkflowOperator(BaseOperator):
    """
    Start a run of a Dify workflow app and wait until it is over; its outputs go to the next task.

    The XComs are those of :class:`~airflow_provider_dify.sensors.dify.DifyWorkflowRunSensor`, and ``workflow_run_id``
    and ``task_id`` (Dify's, for its stop route) as soon as the run has started. On a worker, the task's log has a line
    for each node that starts and ends, and the XCom ``workflow_run`` has ``total_price`` and ``currency`` where Dify's
    events named them.

    From Dify 1.13 on, runs queue while all of Dify's workers are busy. The task waits for its run until ``timeout``.

    A run that failed leaves the task its ``retries``, and each of them starts a new run. A run that a person stopped,
    and inputs that Dify rejects, fail the task without retry.

    A request that may have started a run is not sent again. Its run is looked up in Dify's log by its ``user``. A retry
    continues the run that an earlier try started, while that is alive or has succeeded; not one that Dify was asked to
    stop. If a worker is killed while its run is queued, an Airflow from 3.3 on remembers the request: the retry looks
    for its run, and fails if there is none. Before Airflow 3.3 the retry looks into Dify's log, which doesn't show a
    queued run, and starts a second one. With a ``user`` of your own, the inputs distinguish the runs in the log, too. A
    task that is cleared starts a new run.

    :param inputs: the workflow's inputs by name. Templated. Checked against the app's form before the start.
    :param user: who starts the run, as Dify's log shows it, up to 255 characters; by default one that names Airflow
        installation, Dag, task, Dag run, map index and try. Templated.
    :param dify_conn_id: the Airflow connection of type ``dify``. Templated.
    :param workflow_id: UUID of a published version of the workflow; the current one by default. Templated.
    :param trace_id: the run's id in Dify's tracing (Langfuse and the like): up to 128 letters, digits, ``-`` and ``_``.
        Templated. Where Airflow itself traces the task, its trace goes along as ``traceparent``.
    :param trace_session_id: the session of that trace, up to 200 characters (Dify 1.15 and later). Templated.
    :param extra_body: further fields of the start's body, such as the old ``files``. Templated.
    :param wait_for_completion: wait for the run; else return its id at once, for a sensor downstream.
    :param deferrable: wait on the triggerer. Airflow's ``[operators] default_deferrable`` by default.
    :param defer_after: seconds (or a ``timedelta``) for which a deferrable task waits on its worker first. Most runs
        are over by then, and a deferral costs another start of a worker. 0 to defer as soon as the run has started.
    :param poll_interval: seconds (or a ``timedelta``) between polls.
    :param timeout: seconds (or a ``timedelta``) for the start and the run; seven days by default.
    :param fail_on_partial_success: as for the sensor.
    :param run_timeout: as for the sensor.
    :param not_found_grace: as for the sensor; a minute by default, since some servers write runs late.
    :param max_consecutive_failures: as for the sensor.
    :param end_from_trigger: as for the sensor (Airflow 3.0 and later; implies ``deferrable``).
    :param stop_on_failure: ask Dify to stop the run when the task ends before it: killed, timed out or failed for good.
    :param restart_lost_runs: let ``retries`` start another run where a start got lost: no event stream began, and
        Dify's log, which could be read all the time, showed no run during ``not_found_grace``. The first one may still
        be in Dify's queue, and be paid for, too. By default such a task fails without retry.
    :param output_files: path or URL of a folder, in which the files among the outputs are saved before Dify's URLs of
        them expire; each output's object has ``path`` then. Templated.
    :param multiple_outputs: whether each output is an XCom of its own too.
    :raises DifyInputsRejected: if Dify rejects the inputs.
    :raises DifyRequestError: if Dify rejects the start.
    :raises DifyWorkflowRunUncertain: if a run may have been started and could not be found.
    :raises DifyWorkflowRunTimeout: if ``timeout`` or ``run_timeout`` is over.
    :raises DifyWorkflowRunFailed: if the run failed.
    :raises DifyFilesError: if a file can't be uploaded, or one of the outputs can't be saved.
    :raises DifyError: any other, as the sensor does.
    """

    template_fields: Sequence[str] = (
        "inputs",
        "user",
        "workflow_id",
        "dify_conn_id",
        "trace_id",
        "trace_session_id",
        "extra_body",
        "output_files",
    )
    template_fields_renderers = {"inputs": "json"}  # noqa: RUF012
    # So that Rendered Templates shows the default user, too (Airflow 3.3 and later).
    overwrite_rtif_after_execution = CAN_RENDER_AFTER_EXECUTION
    ui_color = UI_COLOR
    ui_fgcolor = UI_FGCOLOR
    operator_extra_links: tuple[DifyWorkflowRunLink, ...] = (DifyWorkflowRunLink(),)

    def __init__(
        self,
        *,
        inputs: dict[str, Any],
        user: str | None = None,
        dify_conn_id: str = "dify_default",
        workflow_id: str | None = None,
        trace_id: str | None = None,
        trace_session_id: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: timedelta | float = 10,
        timeout: timedelta | float = timedelta(days=7),
        fail_on_partial_success: bool = False,
        run_timeout: timedelta | float | None = None,
        not_found_grace: timedelta | float = 60,
        max_consecutive_failures: int = 5,
        defer_after: timedelta | float = 15,
        end_from_trigger: bool = False,
        stop_on_failure: bool = True,
        restart_lost_runs: bool = False,
        output_files: str | os.PathLike[str] | None = None,
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        # Without the wait the result is the run's id, which has no outputs to be taken apart.
        super().__init__(multiple_outputs=multiple_outputs and wait_for_completion, **kwargs)
        self.inputs = inputs
        self.user = user
        self.dify_conn_id = dify_conn_id
        self.workflow_id = workflow_id
        self.trace_id = trace_id
        self.trace_session_id = trace_session_id
        self.extra_body = extra_body
        self.wait_for_completion = wait_for_completion
        self.poll_interval = parse_seconds("poll_interval", poll_interval)
        self.timeout = parse_seconds("timeout", timeout)
        self.fail_on_partial_success = fail_on_partial_success
        self.run_timeout = None if run_timeout is None else parse_seconds("run_timeout", run_timeout)
        self.not_found_grace = parse_seconds("not_found_grace", not_found_grace)
        self.max_consecutive_failures = parse_count("max_consecutive_failures", max_consecutive_failures)
        self.defer_after = parse_seconds("defer_after", defer_after)
        # What has files to save is left to a worker.
        self.end_from_trigger = parse_end_from_trigger(end_from_trigger) and output_files is None
        self.deferrable = deferrable or end_from_trigger
        self.stop_on_failure = stop_on_failure
        self.restart_lost_runs = restart_lost_runs
        self.output_files = output_files
        self._default_user: str | None = None
        # What on_kill, which has no arguments, has to look at.
        self._task: RunningTask | None = None

    @cached_property
    def hook(self) -> DifyHook:
        """The hook that the worker's requests go through; it leaves retries to the wait."""
        from airflow_provider_dify.hooks.dify import DifyHook

        return DifyHook(self.dify_conn_id, retry_limit=0)

    def execute(self, context: Context) -> Any:
        """
        Start the run, or continue an earlier try's, and wait for it.

        :return: the run's outputs; its id with ``wait_for_completion=False``.
        """
        from airflow_provider_dify.tasks.start import TaskDefers

        with TaskErrors(self.log), self.hook:
            task = self._begin(context, time.time() + self.timeout)
            try:
                return task.execute()
            except TaskDefers:
                # From here on another process waits for the run: a signal to this one must not stop it any more.
                self._task = None
                if self.end_from_trigger:
                    # The triggerer can't do that.
                    task.mark_returned()
                self._defer(task)

    def execute_complete(
        self,
        context: Context,
        event: Any = None,
        start: dict[str, Any] | None = None,
        deadline: float | None = None,
        server_version: str | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        """
        Continue after the triggerer's wait: read the finished run once more, or fail as the wait did.

        :param event: the trigger's event.
        :param start: the start that the task deferred with.
        :param deadline: epoch seconds at which the wait was to give up.
        :param server_version: Dify's version, which a stop depends on.
        :return: the run's outputs.
        """
        with TaskErrors(self.log), self.hook:
            self.hook.server_version = server_version
            deadline = deadline or time.time() + self.timeout
            error = self._error_from_event(event, deadline, context)
            if error is None:
                # The run is over. A worker that comes late reads it all the same, and a failed poll does not end that.
                deadline = max(deadline, time.time() + SECONDS_TO_READ)
            return self._begin(context, deadline).resume(start, event, error)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Continue after a deferral; where no triggerer saw the wait's end, end it as a timeout of the wait."""
        if next_method == "__fail__" and is_deferral_timeout(next_kwargs):
            with TaskErrors(self.log), self.hook:
                error = self._timed_out("No triggerer reported on the run.", context)
                self._begin(context, time.time()).resume(None, None, error)
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """
        Stop the run, when the task is killed while it starts or waits on a worker.

        Airflow 3 lets the task go on after this, and kills its process some seconds later.
        """
        if self._task is not None:
            self._task.kill()
        elif (context := context_of_ended_deferral()) is not None:
            with suppress(DifyError):
                self._begin(context, time.time()).stop_after_deferral()

    def _begin(self, context: Context, deadline: float) -> RunningTask:
        # Imported when a task runs: the scheduler, which only parses the Dag, never needs an HTTP client.
        from airflow_provider_dify.api.run_stream import start_extras
        from airflow_provider_dify.tasks.start import RunArguments, traceparent_of
        from airflow_provider_dify.tasks.task_try import RunningTask

        arguments = RunArguments(
            inputs=self.inputs,
            user=None if self.user == self._default_user else self.user,
            workflow_id=self.workflow_id,
            retries=self.retries or 0,
            wait=WaitArguments.of_task(self),
            waits=self.wait_for_completion,
            deferrable=self.deferrable and self.wait_for_completion,
            defer_after=self.defer_after,
            stop_on_failure=self.stop_on_failure,
            restart_lost_runs=self.restart_lost_runs,
            extras=start_extras(self.trace_id, self.trace_session_id, self.extra_body, traceparent_of(context["ti"])),
            output_files=None if self.output_files is None else str(self.output_files),
        )
        until = Deadline(deadline, self.timeout)
        xcoms = TaskXComs(self, context)
        self._task = RunningTask(arguments, context, self.hook, until, self.log, xcoms, self._show_user)
        return self._task

    def _show_user(self, user: str) -> None:
        if self.user == self._default_user:
            self.user = self._default_user = user

    def _defer(self, task: RunningTask) -> NoReturn:
        from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

        start = task.task_start
        deadline = deferral_end(task.deadline.at, task.context["ti"], self.execution_timeout)
        wait = TriggerWait.of(
            WaitArguments.of_task(self),
            deadline=deadline,
            end_from_trigger=self.end_from_trigger,
            do_xcom_push=self.do_xcom_push,
            has_link=has_link(self),
            multiple_outputs=bool(self.multiple_outputs),
            stop_task_id=start.task_id,
            stop_user=start.user if self.stop_on_failure else None,
            search=start.search.serialize() if start.workflow_run_id is None else None,
            was_seen=True,
        )
        self.defer(
            trigger=DifyWorkflowRunTrigger(start.workflow_run_id, self.dify_conn_id, **wait.serialize()),
            method_name="execute_complete",
            kwargs={"start": start.serialize(), "deadline": deadline, "server_version": self.hook.server_version},
            timeout=timedelta(seconds=max(0.0, deadline - time.time()) + TRIGGER_TIMEOUT_MARGIN),
        )

    def _error_from_event(self, event: Any, deadline: float, context: Context) -> DifyError | None:
        error = error_from_event(event, lambda seen: self._timed_out(seen, context))
        is_over = isinstance(error, DifyWorkflowRunUncertain) and time.time() >= deadline
        if is_over and is_limited(self.execution_timeout, self.timeout):
            # Dify had named no run when the time was over, as it may happen on a worker.
            return self._timed_out("Dify's log did not show its run yet.", context)
        return error

    def _timed_out(self, last_status: str, context: Context) -> DifyError:
        if is_limited(self.execution_timeout, self.timeout):
            number = context["ti"].try_number
            return DifyTaskKilled(
                f"The task's execution_timeout of {self.execution_timeout} is over (try {number}). {last_status}"
            )
        return DifyWorkflowRunTimeout(f"The operator's timeout of {self.timeout:g} seconds is over. {last_status}")
