# SPDX-License-Identifier: Apache-2.0
"""Wait on a Dify workflow run in a task."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.common.compat.sdk import (
    AirflowException,
    AirflowSensorTimeout,
    AirflowSkipException,
    AirflowTaskTimeout,
    BaseSensorOperator,
    PokeReturnValue,
    conf,
)

from airflow_provider_dify.airflow_versions import (
    CAN_START_FROM_TRIGGER,
    TRIGGER_TIMEOUT_MARGIN,
    execute_as_sensor,
    first_reschedule_date,
    is_deferral_timeout,
    params_without_default,
)
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyConnectionError,
    DifyWorkflowRunNotFound,
    TaskErrors,
)
from airflow_provider_dify.links.dify import UI_COLOR, UI_FGCOLOR, DifyWorkflowRunLink
from airflow_provider_dify.runs.waiting import (
    Outcome,
    RunWait,
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

    from airflow_provider_dify.api.models import WorkflowRun
    from airflow_provider_dify.hooks.dify import DifyHook
    from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

# A worker that ends a try needs seconds, in which the next one must not begin.
SHORTEST_RESCHEDULE = 60.0
# Seconds, at most, before a rescheduled sensor asks again for a run that Dify does not know any more.
MAX_PAUSE_BEFORE_SECOND_LOOK = 10.0
TRIGGER = "airflow_provider_dify.triggers.dify.DifyWorkflowRunTrigger"


class DifyWorkflowRunSensor(BaseSensorOperator):
    """
    Wait until a Dify workflow run is over, and pass its outputs to the next task.

    The task succeeds when the run's status is ``succeeded`` (or ``partial-succeeded``, with a warning) and fails
    without retry when it is ``failed`` or ``stopped``, or when the API key's app has no such run. While it is
    ``running``, ``paused`` or ``scheduled``, the sensor waits.

    The return value is the run's outputs, a dict (``{}`` where the run has none); each output is an XCom of its own
    too, so that ``wait.output["answer"]`` works. The XCom ``workflow_run`` holds the rest: ``id, workflow_id, status,
    error, total_steps, total_tokens, created_at, finished_at, elapsed_time``. It is there for a run that failed, too.
    An output named like an XCom of these tasks (``workflow_run``, ``workflow_run_id``, ``task_id``, ``return_value``,
    ``dify-run-log``) is part of the return value only.

    :param workflow_run_id: the run's UUID. Templated.
    :param dify_conn_id: the Airflow connection of type ``dify``. Templated.
    :param fail_on_partial_success: fail on ``partial-succeeded``: a node failed and its error handling took over.
    :param not_found_grace: seconds (or a ``timedelta``) from the first poll during which an unknown run is waited
        for; for servers that write runs late. 0 by default: an unknown run fails the task at once.
    :param run_timeout: seconds (or a ``timedelta``) since the run's own creation after which a run that is not over
        fails the task; for runs that Dify leaves ``running`` for ever. No limit by default.
    :param max_consecutive_failures: polls in a row that may fail for a passing reason (transport, 5xx, 429). In
        reschedule mode a failed poll is left to Airflow's retries.
    :param poke_interval: seconds (or a ``timedelta``) between polls.
    :param output_files: path or URL of a folder, in which the files among the outputs are saved before Dify's URLs of
        them expire; each output's object has ``path`` then. Templated.
    :param multiple_outputs: whether each output is an XCom of its own too.
    :param deferrable: look once on the worker, then wait on the triggerer, which takes no worker slot; ``mode`` has no
        meaning then. Airflow's ``[operators] default_deferrable`` by default.
    :param end_from_trigger: let the triggerer end the task when the run succeeded, so that no worker starts again
        (Airflow 3.0 and later; implies ``deferrable``). The triggerer, which all deferred tasks share, then carries the
        outputs: for small ones, that no downstream task is mapped over.
    :param start_from_trigger: start on the triggerer, so that the wait never touches a worker (Airflow 3.3 and later;
        implies ``deferrable``). ``workflow_run_id`` may be a literal, a template of ``params`` or ``dag_run.conf``, or
        an upstream task's output; the sensor cannot be mapped, and each param of its Dag needs a default.
    :raises DifyWorkflowRunCannotSucceed: a :class:`DifyWorkflowRunFailed`, if the run failed or was stopped.
    :raises DifyWorkflowRunTimeout: if ``run_timeout`` is over.
    :raises DifyWorkflowRunNotFound: if there is no such run.
    :raises DifyFilesError: if a file among the outputs can't be saved.
    :raises DifyError: any other, as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run` does.
    """

    template_fields: Sequence[str] = ("workflow_run_id", "dify_conn_id", "output_files")
    ui_color = UI_COLOR
    ui_fgcolor = UI_FGCOLOR
    operator_extra_links: tuple[DifyWorkflowRunLink, ...] = (DifyWorkflowRunLink(),)

    def __init__(
        self,
        *,
        workflow_run_id: str,
        dify_conn_id: str = "dify_default",
        fail_on_partial_success: bool = False,
        not_found_grace: timedelta | float = 0,
        run_timeout: timedelta | float | None = None,
        max_consecutive_failures: int = 5,
        poke_interval: timedelta | float = 10,
        output_files: str | os.PathLike[str] | None = None,
        multiple_outputs: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        end_from_trigger: bool = False,
        start_from_trigger: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, multiple_outputs=multiple_outputs, **kwargs)
        if self.reschedule and not deferrable and self.poke_interval < SHORTEST_RESCHEDULE:
            warnings.warn(
                f"{self.task_id}: mode='reschedule' with poke_interval={self.poke_interval:g} can fail: Airflow "
                f"takes a task for dead that comes back within seconds. Use {SHORTEST_RESCHEDULE:g} or more, or "
                "deferrable=True.",
                UserWarning,
                stacklevel=2,
            )
        self.workflow_run_id = workflow_run_id
        self.dify_conn_id = dify_conn_id
        self.output_files = output_files
        self.fail_on_partial_success = fail_on_partial_success
        self.not_found_grace = parse_seconds("not_found_grace", not_found_grace)
        self.run_timeout = None if run_timeout is None else parse_seconds("run_timeout", run_timeout)
        self.max_consecutive_failures = parse_count("max_consecutive_failures", max_consecutive_failures)
        # What has files to save is left to a worker.
        self.end_from_trigger = parse_end_from_trigger(end_from_trigger) and output_files is None
        self.deferrable = deferrable or end_from_trigger or start_from_trigger
        self._wait: RunWait | None = None
        self._xcoms: TaskXComs | None = None
        self._deadline: float | None = None
        self._ended_with: BaseException | None = None
        if start_from_trigger:
            self._start_from_trigger()

    @classmethod
    def partial(cls, **kwargs: Any) -> Any:
        """Map the sensor, as Airflow does; not with ``start_from_trigger``, which Airflow cannot map."""
        if kwargs.get("start_from_trigger"):
            raise DifyConfigurationError(_MAPPED_START)
        return super().partial(**kwargs)

    @cached_property
    def hook(self) -> DifyHook:
        """The hook that the worker's polls go through."""
        # Imported when a task runs: the scheduler, which only parses the Dag, never needs an HTTP client.
        from airflow_provider_dify.hooks.dify import DifyHook

        return DifyHook(self.dify_conn_id)

    def execute(self, context: Context) -> dict[str, Any] | None:
        """
        Wait for the run, as Airflow's sensors do.

        :return: the run's outputs.
        """
        return self._execute(context)

    def execute_complete(
        self, context: Context, event: Any = None, deadline: float | None = None, **_: Any
    ) -> dict[str, Any] | None:
        """
        Continue after the triggerer's wait: read the finished run once more, or fail as the wait did.

        :param event: the trigger's event.
        :param deadline: epoch seconds at which the wait was to give up.
        :return: the run's outputs.
        """
        self._deadline = deadline
        self._ended_with = error_from_event(event, self._deferral_timed_out)
        return self._execute(context)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """
        Continue after a deferral, with ``soft_fail`` and ``never_fail`` meaning what they mean while poking.

        Airflow's own sensors take every failure after a deferral for one to skip on, temporary ones included, and
        Airflow 2 forgets ``never_fail`` there.
        """
        try:
            return super(BaseSensorOperator, self).resume_execution(next_method, next_kwargs, context)
        except AirflowException as error:
            if next_method != "__fail__":
                raise
            # The wait was lost: no triggerer lived to see its deadline, or the trigger could not be loaded.
            self._ended_with = (
                self._deferral_timed_out("No triggerer reported on the run.")
                if is_deferral_timeout(next_kwargs)
                else error
            )
            return self._execute(context)

    def poke(self, context: Context) -> PokeReturnValue:
        """
        Look at the run once. In deferrable mode, leave the rest of the wait to the triggerer.

        :return: whether the run is over, and its outputs then.
        """
        if self._ended_with is not None:
            # Raised here, where Airflow's sensors apply soft_fail, never_fail and silent_fail.
            raise self._ended_with
        if self._wait is None:
            self._wait = RunWait(
                self.workflow_run_id,
                self._wait_arguments(),
                log=self.log,
                first_poll=self._first_poll(context),
                on_first_run=lambda run: self._task_xcoms(context).push_link(run.app_id),
            )
        try:
            try:
                run = self._read_run()
            except DifyWorkflowRunNotFound:
                if self.deferrable or not self.reschedule or first_reschedule_date(context) is None:
                    raise
                # An earlier poke, of which nothing is left here, has seen the run.
                time.sleep(min(self.poke_interval, MAX_PAUSE_BEFORE_SECOND_LOOK))
                run = self._read_run()
        except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
            self._wait.on_failed_poll(error)
            return self._not_yet(self._wait, context)
        if run is None:
            return self._not_yet(self._wait, context)
        if self._wait.status is None and self.hook.server_version:
            self.log.info("Dify %s at %s", self.hook.server_version, self.hook.connection.base_url)
        verdict = self._wait.on_poll(run)
        if verdict.outcome is Outcome.WAIT:
            return self._not_yet(self._wait, context)
        lost = None
        if self.output_files is not None:
            from airflow_provider_dify.runs.downloads import save_files

            run, lost = self.hook.run_on_loop(
                lambda client: save_files(client, run, verdict, str(self.output_files), self.log)
            )
        outputs = self._task_xcoms(context).push_and_return(run, verdict, files_error=lost)
        return PokeReturnValue(True, xcom_value=outputs)

    def _read_run(self) -> WorkflowRun | None:
        """Return the run; ``None`` where there is none to wait for yet."""
        return self.hook.get_workflow_run(self.workflow_run_id)

    def _task_xcoms(self, context: Context) -> TaskXComs:
        if self._xcoms is None:
            self._xcoms = TaskXComs(self, context)
        return self._xcoms

    def _execute(self, context: Context) -> dict[str, Any] | None:
        self._task_xcoms(context)
        try:
            with TaskErrors(self.log):
                outputs: dict[str, Any] | None = execute_as_sensor(self, context)
                return outputs
        except (AirflowSensorTimeout, AirflowSkipException) as error:
            # Without a cause it is Airflow's own word on the sensor's timeout, which doesn't know of the run.
            if self._wait is None or error is self._ended_with or error.__cause__ is not None:
                raise
            raise type(error)(self._timed_out(self._wait.describe_last_status())) from None
        finally:
            self.hook.close()

    def _not_yet(self, wait: RunWait, context: Context) -> PokeReturnValue:
        return self._defer(wait, context) if self.deferrable else PokeReturnValue(False)

    def _defer(self, wait: RunWait, context: Context) -> NoReturn:
        if self._deadline is None:
            self._deadline = deferral_end(time.time() + self.timeout, context["ti"], self.execution_timeout)
        self.defer(
            trigger=self._trigger(self._trigger_wait(self._deadline, wait.first_poll.timestamp())),
            method_name="execute_complete",
            kwargs={"deadline": self._deadline},
            timeout=timedelta(seconds=max(0.0, self._deadline - time.time()) + TRIGGER_TIMEOUT_MARGIN),
        )

    def _trigger(self, wait: TriggerWait) -> DifyWorkflowRunTrigger:
        from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

        return DifyWorkflowRunTrigger(self.workflow_run_id, self.dify_conn_id, **wait.serialize())

    def _start_from_trigger(self) -> None:
        if not CAN_START_FROM_TRIGGER:
            raise DifyConfigurationError("start_from_trigger=True needs Airflow 3.3 or later. Use deferrable=True.")
        if getattr(self, "_BaseOperator__from_mapped", False) or self.get_closest_mapped_task_group():
            raise DifyConfigurationError(_MAPPED_START)
        if names := params_without_default(self):
            raise DifyConfigurationError(
                f"The Dag's param {names[0]!r} has no default. With start_from_trigger=True, Airflow's triggerer would "
                "end on it, and all waits with it. Give the param a default, or use deferrable=True."
            )
        from airflow.triggers.base import StartTriggerArgs

        from airflow_provider_dify.triggers.templates import argument_for_triggerer

        self.start_from_trigger = True
        self.start_trigger_args = StartTriggerArgs(
            trigger_cls=TRIGGER,
            trigger_kwargs={
                "workflow_run_id": argument_for_triggerer("workflow_run_id", self.workflow_run_id),
                "dify_conn_id": argument_for_triggerer("dify_conn_id", self.dify_conn_id),
                **self._trigger_wait(None, None).serialize(),
            },
            next_method="execute_complete",
            timeout=timedelta(seconds=self.timeout + TRIGGER_TIMEOUT_MARGIN),
        )

    def _trigger_wait(self, deadline: float | None, first_poll: float | None) -> TriggerWait:
        return TriggerWait.of(
            self._wait_arguments(),
            deadline=deadline,
            first_poll=first_poll,
            exponential_backoff=self.exponential_backoff,
            max_wait=self.max_wait.total_seconds() if self.max_wait else None,
            end_from_trigger=self.end_from_trigger,
            do_xcom_push=self.do_xcom_push,
            has_link=has_link(self),
            multiple_outputs=bool(self.multiple_outputs),
            was_seen=self._wait is not None and self._wait.was_seen,
        )

    def _wait_arguments(self) -> WaitArguments:
        failures: int | None = self.max_consecutive_failures
        if self.deferrable:
            # What silent_fail does to a failed poke.
            failures = None if self.silent_fail else failures
        elif self.reschedule:
            # A rescheduled sensor remembers nothing between polls; Airflow counts its retries instead.
            failures = 0
        return WaitArguments.of_task(self, poll_interval=self.poke_interval, max_consecutive_failures=failures)

    def _first_poll(self, context: Context) -> datetime | None:
        # Only a grace period asks, and a rescheduled sensor has to ask Airflow's database.
        if self.deferrable or not (self.reschedule and self.not_found_grace):
            return None
        return first_reschedule_date(context)

    def _deferral_timed_out(self, last_seen: str) -> BaseException:
        if is_limited(self.execution_timeout, self.timeout):
            why = f"The task's execution_timeout of {self.execution_timeout} is over."
            return AirflowTaskTimeout(self._timed_out(last_seen, why))
        return AirflowSensorTimeout(self._timed_out(last_seen))

    def _timed_out(self, last_seen: str, why: str | None = None) -> str:
        return f"{why or f'The sensor has timed out after {self.timeout:g} seconds.'} {last_seen}"


_MAPPED_START = (
    "start_from_trigger=True does not go with a mapped sensor: Airflow renders no mapped argument on the triggerer. "
    "Use deferrable=True, with end_from_trigger=True if no worker should start again."
)
