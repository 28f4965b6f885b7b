"""Wait on a Dify workflow run in a task."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseSensorOperator, PokeReturnValue

from airflow_provider_dify.airflow_versions import execute_as_sensor, first_reschedule_date
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyConnectionError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.waiting import RunWait, WaitPolicy, seconds
from airflow_provider_dify.workflow_run import Outcome

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.hooks.dify import DifyHook


class DifyWorkflowRunSensor(BaseSensorOperator):
    """
    Wait until a Dify workflow run is over, and hand its outputs to the next task.

    The task succeeds when the run's status is ``succeeded`` (or ``partial-succeeded``, with a warning) and fails
    without retry when it is ``failed`` or ``stopped``, or when the API key's app has no such run. While it is
    ``running``, ``paused`` or ``scheduled``, the sensor waits.

    The return value is the run's outputs, a dict (``{}`` where the run has none); each output is an XCom of its own
    too, so that ``wait.output["answer"]`` works. The XCom ``workflow_run`` holds the rest: ``id, workflow_id, status,
    error, total_steps, total_tokens, created_at, finished_at, elapsed_time``. It is there for a run that failed, too.

    :param workflow_run_id: the run's UUID. Templated.
    :param dify_conn_id: the Airflow connection of type ``dify``. Templated.
    :param fail_on_partial_success: fail on ``partial-succeeded``: a node failed and its error handling took over.
    :param not_found_grace: seconds (or a ``timedelta``) from the first poll during which an unknown run is waited
        for; for servers that write runs late. 0 by default: an unknown run fails the task at once.
    :param run_timeout: seconds (or a ``timedelta``) since the run's own creation after which a run that is not over
        fails the task; for runs that Dify leaves ``running`` for ever. No limit by default.
    :param max_consecutive_failures: polls in a row that may fail for a passing reason (transport, 5xx, 429) in poke
        mode. In reschedule mode a failed poll is left to Airflow's retries.
    :param poke_interval: seconds (or a ``timedelta``) between polls.
    :param multiple_outputs: whether each output is an XCom of its own too.
    :raises DifyWorkflowRunFailed: if the run failed or was stopped.
    :raises DifyWorkflowRunTimeout: if ``run_timeout`` is over.
    :raises DifyWorkflowRunNotFound: if there is no such run.
    :raises DifyError: any other, as :meth:`airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run` does.
    """

    template_fields: Sequence[str] = ("workflow_run_id", "dify_conn_id")
    ui_color = "#d5e0ff"

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
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(poke_interval=poke_interval, multiple_outputs=multiple_outputs, **kwargs)
        self.workflow_run_id = workflow_run_id
        self.dify_conn_id = dify_conn_id
        self.fail_on_partial_success = fail_on_partial_success
        self.not_found_grace = seconds("not_found_grace", not_found_grace)
        self.run_timeout = None if run_timeout is None else seconds("run_timeout", run_timeout)
        if not isinstance(max_consecutive_failures, int) or max_consecutive_failures < 0:
            raise DifyConfigurationError(
                f"max_consecutive_failures must be a whole number, not below 0: {max_consecutive_failures!r}"
            )
        self.max_consecutive_failures = max_consecutive_failures
        self._wait: RunWait | None = None

    @cached_property
    def hook(self) -> DifyHook:
        """The hook that the polls go through."""
        # Imported when a task runs: the scheduler, which only parses the Dag, never needs an HTTP client.
        from airflow_provider_dify.hooks.dify import DifyHook

        return DifyHook(self.dify_conn_id)

    def execute(self, context: Context) -> dict[str, Any] | None:
        """
        Wait for the run, as Airflow's sensors do.

        :return: the run's outputs.
        """
        try:
            outputs: dict[str, Any] | None = execute_as_sensor(self, context)
            return outputs
        finally:
            self.hook.close()

    def poke(self, context: Context) -> PokeReturnValue:
        """
        Look at the run once.

        :return: whether the run is over, and its outputs then.
        """
        if self._wait is None:
            self._wait = RunWait(
                self.workflow_run_id, self._policy(), log=self.log, first_poll=self._first_poll(context)
            )
        try:
            run = self.hook.get_workflow_run(self.workflow_run_id)
        except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
            self._wait.put_up_with(error)
            return PokeReturnValue(False)
        verdict = self._wait.look_at(run)
        if verdict.outcome is Outcome.WAIT:
            return PokeReturnValue(False)
        if self.do_xcom_push:
            context["ti"].xcom_push(key="workflow_run", value=run.without_payload())
        verdict.raise_if_failed(run)
        return PokeReturnValue(True, xcom_value=run.outputs or {})

    def _policy(self) -> WaitPolicy:
        return WaitPolicy(
            fail_on_partial_success=self.fail_on_partial_success,
            not_found_grace=self.not_found_grace,
            run_timeout=self.run_timeout,
            # A rescheduled sensor remembers nothing between polls; Airflow counts its retries instead.
            max_consecutive_failures=0 if self.reschedule else self.max_consecutive_failures,
        )

    def _first_poll(self, context: Context) -> datetime | None:
        # Only a grace period asks, and a rescheduled sensor has to ask Airflow's database.
        if not (self.reschedule and self.not_found_grace):
            return None
        return first_reschedule_date(context)
