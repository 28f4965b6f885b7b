"""Start a Dify workflow run in a task, and wait on it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

from airflow.providers.common.compat.sdk import AirflowFailException, BaseOperator, conf

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER, TRIGGER_TIMEOUT_MARGIN, is_deferral_timeout
from airflow_provider_dify.api.routes import MAX_USER_LENGTH
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.links.dify import DifyWorkflowRunLink, push_run_log
from airflow_provider_dify.verdict import Outcome, judge
from airflow_provider_dify.waiting import (
    STOP_ASKED,
    RunWait,
    WaitPolicy,
    error_of_event,
    hand_over,
    seconds,
    whole_number,
)

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.api.run_stream import WorkflowRunStream
    from airflow_provider_dify.hooks.dify import DifyHook

# How often, and how far apart, the log is searched for a run of which no id came back.
SEARCHES = 4
SEARCH_INTERVAL = 2.0
# How far Dify's clock may be behind ours for a run to count as started by this try.
CLOCK_TOLERANCE = timedelta(seconds=60)
STATE_KEY = "dify_workflow_run"


class DifyRunWorkflowOperator(BaseOperator):
    """
    Start a run of a Dify workflow app and wait until it is over; its outputs go to the next task.

    The result is that of :class:`airflow_provider_dify.sensors.dify.DifyWorkflowRunSensor`: the same XComs, exceptions
    and policies. The XComs ``workflow_run_id`` and ``task_id`` (Dify's, for its stop route) are there as soon as the
    run has started. On a worker, the task's log tells each node that starts and ends.

    A run is not paid for twice: a request that may have started one is never sent twice, but looked up in Dify's log by
    its ``user``; and a retry goes on with the run that an earlier try started, while that is alive or has succeeded.
    Without a ``user`` of your own that works on every Airflow, as long as Dify's log shows runs that are not over yet
    (it does since about 1.9); with one it needs Airflow 3.3. A task that is cleared starts a new run.

    :param inputs: the workflow's inputs by name. Templated.
    :param user: who starts the run, as Dify's log shows it, up to 255 characters; by default one that names Dag, task,
        Dag run, map index and try. Templated.
    :param dify_conn_id: the Airflow connection of type ``dify``. Templated.
    :param workflow_id: UUID of a published version of the workflow; the current one by default. Templated.
    :param wait_for_completion: wait for the run; else return its id at once, for a sensor downstream.
    :param deferrable: wait on the triggerer. Airflow's ``[operators] default_deferrable`` by default.
    :param poll_interval: seconds (or a ``timedelta``) between polls.
    :param timeout: seconds (or a ``timedelta``) to wait for the run; seven days by default.
    :param fail_on_partial_success: as for the sensor.
    :param run_timeout: as for the sensor.
    :param not_found_grace: as for the sensor; a minute by default, since some servers write runs late.
    :param max_consecutive_failures: as for the sensor.
    :param end_from_trigger: as for the sensor (Airflow 3.0 and later; implies ``deferrable``).
    :param stop_on_failure: ask Dify to stop the run when the task ends before it: killed, timed out or failed for good.
    :param multiple_outputs: whether each output is an XCom of its own too.
    :raises DifyRequestError: if Dify rejects the start.
    :raises DifyWorkflowRunUncertain: if a run may have been started and could not be found.
    :raises DifyWorkflowRunTimeout: if ``timeout`` or ``run_timeout`` is over.
    :raises DifyError: any other, as the sensor does.
    """

    template_fields: Sequence[str] = ("inputs", "user", "workflow_id", "dify_conn_id")
    template_fields_renderers = {"inputs": "json"}  # noqa: RUF012
    ui_color = "#d5e0ff"
    operator_extra_links: tuple[DifyWorkflowRunLink, ...] = (DifyWorkflowRunLink(),)

    def __init__(
        self,
        *,
        inputs: dict[str, Any],
        user: str | None = None,
        dify_conn_id: str = "dify_default",
        workflow_id: str | None = None,
        wait_for_completion: bool = True,
        deferrable: bool = conf.getboolean("operators", "default_deferrable", fallback=False),
        poll_interval: timedelta | float = 10,
        timeout: timedelta | float = timedelta(days=7),
        fail_on_partial_success: bool = False,
        run_timeout: timedelta | float | None = None,
        not_found_grace: timedelta | float = 60,
        max_consecutive_failures: int = 5,
        end_from_trigger: bool = False,
        stop_on_failure: bool = True,
        multiple_outputs: bool = True,
        **kwargs: Any,
    ) -> None:
        # Without the wait the result is the run's id, which has no outputs to be taken apart.
        super().__init__(multiple_outputs=multiple_outputs and wait_for_completion, **kwargs)
        if not self.do_xcom_push:
            # The link is read from an XCom, and Airflow 3 pushes each link of a task, known or not.
            self.operator_extra_links = ()
        self.inputs = inputs
        self.user = user
        self.dify_conn_id = dify_conn_id
        self.workflow_id = workflow_id
        self.wait_for_completion = wait_for_completion
        self.poll_interval = seconds("poll_interval", poll_interval)
        self.timeout = seconds("timeout", timeout)
        self.fail_on_partial_success = fail_on_partial_success
        self.run_timeout = None if run_timeout is None else seconds("run_timeout", run_timeout)
        self.not_found_grace = seconds("not_found_grace", not_found_grace)
        self.max_consecutive_failures = whole_number("max_consecutive_failures", max_consecutive_failures)
        if end_from_trigger and not CAN_END_FROM_TRIGGER:
            raise DifyConfigurationError("end_from_trigger=True needs Airflow 3.0 or later. Use deferrable=True.")
        self.end_from_trigger = end_from_trigger
        self.deferrable = deferrable or end_from_trigger
        self.stop_on_failure = stop_on_failure
        # What on_kill, which is told nothing, has to stop.
        self._running: _Running | None = None

    @cached_property
    def hook(self) -> DifyHook:
        """The hook that the worker's requests go through."""
        from airflow_provider_dify.hooks.dify import DifyHook

        return DifyHook(self.dify_conn_id)

    def execute(self, context: Context) -> Any:
        """
        Start the run, or go on with an earlier try's, and wait for it.

        :return: the run's outputs; its id with ``wait_for_completion=False``.
        """
        with self.hook:
            deadline = time.time() + self.timeout
            run = self._earlier_run(context, deadline)
            if run is not None:
                return self._go_on(run, None, context, deadline)
            user = self.user or default_user(context["ti"], context["ti"].try_number)
            asked_at = datetime.now(timezone.utc)
            try:
                stream = self.hook.start_workflow_run(self.inputs, user, workflow_id=self.workflow_id)
            except DifyWorkflowRunUncertain as error:
                run = self._find(user, asked_at, error)
                self._remember(run, context)
                return self._go_on(run, None, context, deadline)
            with stream:
                run = _Running(stream.workflow_run_id, stream.task_id, user)
                self._remember(run, context)
                push_run_log(self, context, stream.app_id)
                self.log.info("Dify started workflow run %s for user %r.", run.workflow_run_id, user)
                return self._go_on(run, stream, context, deadline)

    def execute_complete(
        self, context: Context, event: Any = None, run: dict[str, Any] | None = None, deadline: float | None = None
    ) -> dict[str, Any]:
        """
        Go on after the triggerer's wait: read the finished run once more, or fail as the wait did.

        :param event: what the trigger told.
        :param run: the run that was started.
        :param deadline: epoch seconds at which the wait was to give up.
        :return: the run's outputs.
        """
        with self.hook:
            self._running = running = _Running(**run) if run else self._remembered(context)
            error = error_of_event(event, self._timed_out)
            if error is not None:
                self._give_up(error, context)
            return self._wait_here(running, None, context, deadline or time.time() + self.timeout)

    def resume_execution(self, next_method: str, next_kwargs: dict[str, Any] | None, context: Context) -> Any:
        """Go on after a deferral; where no triggerer saw the wait's end, end it as a timeout of the wait."""
        if next_method == "__fail__" and is_deferral_timeout(next_kwargs):
            with self.hook:
                self._running = self._remembered(context)
                self._give_up(self._timed_out("No triggerer told of the run."), context)
        return super().resume_execution(next_method, next_kwargs, context)

    def on_kill(self) -> None:
        """Ask Dify to stop the run, when the task is killed while it waits on a worker."""
        if self._running is not None:
            self._stop(self._running)

    # --- the run

    def _earlier_run(self, context: Context, deadline: float) -> _Running | None:
        """Give the run that an earlier try of this task started, if it is alive or has succeeded."""
        ti = context["ti"]
        # After a task was cleared its tries go on counting, but what came before was to be done anew.
        first_try = (ti.max_tries or 0) - (self.retries or 0) + 1
        if ti.try_number <= first_try:
            return None
        failures = 0
        while True:
            try:
                return self._look_for_earlier_run(context, first_try)
            except DifyConnectionError as error:  # noqa: PERF203
                # Waited out as a failed poll is: that Dify is away is no reason to give its run up.
                failures += 1
                if failures > self.max_consecutive_failures or time.time() >= deadline:
                    raise
                self.log.warning("The run of an earlier try could not be looked up, %d in a row of at most %d: %s",
                                 failures, self.max_consecutive_failures, error)  # fmt: skip
                time.sleep(max(0.0, min(self.poll_interval, deadline - time.time())))

    def _look_for_earlier_run(self, context: Context, first_try: int) -> _Running | None:
        ti = context["ti"]
        found = self._from_state(context, first_try) or self._from_log(ti, first_try)
        if found is None:
            return None
        try:
            run = self.hook.get_workflow_run(found.workflow_run_id)
        except DifyWorkflowRunNotFound:
            return None
        verdict = judge(run, now=datetime.now(timezone.utc), run_timeout=self.run_timeout)
        if verdict.outcome not in (Outcome.WAIT, Outcome.DONE):
            self.log.info("An earlier try's run cannot succeed, so a new one is started. %s", verdict.reason)
            return None
        self.log.info("Going on with the run that an earlier try started. %s", verdict.reason)
        self._remember(found, context)
        push_run_log(self, context, run.app_id)
        return found

    def _from_state(self, context: Context, first_try: int) -> _Running | None:
        # Airflow 3.3 and later keep it from try to try.
        store: Any = context.get("task_state_store")
        kept = store.get(STATE_KEY) if store is not None else None
        if not isinstance(kept, dict) or kept.get("try_number", 0) < first_try:
            return None
        return _Running(str(kept.get("workflow_run_id")), kept.get("task_id"), str(kept.get("user")))

    def _from_log(self, ti: Any, first_try: int) -> _Running | None:
        # A user of one's own says nothing of the try that a run belongs to.
        if self.user is not None:
            return None
        for try_number in range(ti.try_number - 1, first_try - 1, -1):
            user = default_user(ti, try_number)
            # Compared once more, in case a server takes no notice of what it was asked for.
            runs = [run for run in self.hook.list_workflow_runs(user=user, limit=2) if run.user == user]
            if runs:
                return _Running(runs[0].workflow_run_id, None, user)
        return None

    def _find(self, user: str, asked_at: datetime, error: DifyWorkflowRunUncertain) -> _Running:
        """Look for the run of a start that broke off; exactly one must fit."""
        self.log.warning("%s", error)
        for search in range(SEARCHES):
            if search:
                time.sleep(SEARCH_INTERVAL)
            try:
                listed = self.hook.list_workflow_runs(user=user, created_after=asked_at - CLOCK_TOLERANCE, limit=10)
            except DifyConnectionError as failure:
                # Let out, it would have Airflow retry, and the retry start another run.
                self.log.warning("%s", failure)
                continue
            fitting = [run for run in listed if run.user == user]
            if len(fitting) == 1:
                self.log.info("Dify's log names it: workflow run %s.", fitting[0].workflow_run_id)
                return _Running(fitting[0].workflow_run_id, None, user)
            if fitting:
                ids = ", ".join(run.workflow_run_id for run in fitting)
                raise DifyWorkflowRunUncertain(
                    f"{error} There are several that it may be: {ids}.", user=user
                ) from error
        raise error

    def _remember(self, run: _Running, context: Context) -> None:
        """Tell everyone of the run at once, so that no crash loses it."""
        self._running = run
        ti = context["ti"]
        store: Any = context.get("task_state_store")
        if store is not None:
            store.set(STATE_KEY, {**vars(run), "try_number": ti.try_number})
        if self.do_xcom_push:
            ti.xcom_push(key="workflow_run_id", value=run.workflow_run_id)
            if run.task_id:
                ti.xcom_push(key="task_id", value=run.task_id)

    def _remembered(self, context: Context) -> _Running:
        """Give the run that this try started, for ``dag.test()``, which hands a resumed task nothing but the event."""
        ti = context["ti"]
        run_id, task_id = (
            ti.xcom_pull(task_ids=ti.task_id, key=key, map_indexes=ti.map_index)
            for key in ("workflow_run_id", "task_id")
        )
        return _Running(str(run_id), task_id, self.user or default_user(ti, ti.try_number))

    # --- the wait

    def _go_on(self, run: _Running, stream: WorkflowRunStream | None, context: Context, deadline: float) -> Any:
        if not self.wait_for_completion:
            return run.workflow_run_id
        if not self.deferrable:
            return self._wait_here(run, stream, context, deadline)
        if stream is not None:
            stream.close()
        return self._defer(run, deadline)

    def _wait_here(
        self, running: _Running, stream: WorkflowRunStream | None, context: Context, deadline: float
    ) -> dict[str, Any]:
        wait = RunWait(
            running.workflow_run_id,
            self._policy(),
            log=self.log,
            on_first_look=lambda run: push_run_log(self, context, run.app_id),
        )
        try:
            told = self._follow(stream, wait, deadline) if stream is not None else None
            interval = min(1.0, self.poll_interval) if told else self.poll_interval
            while True:
                try:
                    run = self.hook.get_workflow_run(running.workflow_run_id)
                except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
                    wait.put_up_with(error)
                else:
                    verdict = wait.look_at(run)
                    if verdict.outcome is not Outcome.WAIT:
                        if told and told != run.status:
                            self.log.warning(
                                "The event stream said %s, the run's detail says %s; the detail decides.",
                                told,
                                run.status,
                            )
                        return hand_over(run, verdict, context, do_xcom_push=self.do_xcom_push)
                if time.time() >= deadline:
                    raise self._timed_out(wait.last_seen())
                time.sleep(max(0.0, min(interval, deadline - time.time())))
                interval = min(interval * 2, self.poll_interval)
        except DifyError as error:
            self._give_up(error, context)

    def _follow(self, stream: WorkflowRunStream, wait: RunWait, deadline: float) -> str | None:
        """
        Log what the run's events tell, until there is reason to look at the run itself.

        :return: the status that the stream said the run ended with; ``None`` if it didn't say.
        """
        look_again = time.time() + self.poll_interval
        try:
            for event in stream:
                progress = event.progress()
                if progress:
                    self.log.info("%s", progress)
                if event.is_ending:
                    status = event.data.get("status")
                    if event.name == "error":
                        self.log.warning("The event stream of workflow run %s ended with the error %s.",
                                         wait.workflow_run_id, event.data)  # fmt: skip
                    return str(status) if event.name == "workflow_finished" else None
                if time.time() >= deadline:
                    return None
                # A paused run says nothing but pings, and so does one that hangs.
                if time.time() >= look_again:
                    look_again = time.time() + self.poll_interval
                    if self._is_over(wait):
                        return None
        except DifyConnectionError as error:
            self.log.warning("%s Looking at the run every %g seconds instead.", error, self.poll_interval)
        return None

    def _is_over(self, wait: RunWait) -> bool:
        try:
            return wait.look_at(self.hook.get_workflow_run(wait.workflow_run_id)).outcome is not Outcome.WAIT
        except (DifyConnectionError, DifyWorkflowRunNotFound):
            # As long as the stream lives, the run does.
            return False

    def _defer(self, run: _Running, deadline: float) -> NoReturn:
        from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

        policy = self._policy()
        self.defer(
            trigger=DifyWorkflowRunTrigger(
                run.workflow_run_id,
                self.dify_conn_id,
                poll_interval=self.poll_interval,
                deadline=deadline,
                fail_on_partial_success=policy.fail_on_partial_success,
                not_found_grace=policy.not_found_grace,
                run_timeout=policy.run_timeout,
                max_consecutive_failures=policy.max_consecutive_failures,
                end_from_trigger=self.end_from_trigger,
                do_xcom_push=self.do_xcom_push,
                multiple_outputs=bool(self.multiple_outputs),
                stop_task_id=run.task_id if self.stop_on_failure else None,
                stop_user=run.user if self.stop_on_failure else None,
            ),
            method_name="execute_complete",
            kwargs={"run": vars(run), "deadline": deadline},
            timeout=timedelta(seconds=max(0.0, deadline - time.time()) + TRIGGER_TIMEOUT_MARGIN),
        )

    def _policy(self) -> WaitPolicy:
        return WaitPolicy(
            fail_on_partial_success=self.fail_on_partial_success,
            not_found_grace=self.not_found_grace,
            run_timeout=self.run_timeout,
            max_consecutive_failures=self.max_consecutive_failures,
        )

    # --- the end of it

    def _timed_out(self, last_seen: str) -> DifyWorkflowRunTimeout:
        return DifyWorkflowRunTimeout(f"The wait has timed out after {self.timeout:g} seconds. {last_seen}")

    def _give_up(self, error: Exception, context: Context) -> NoReturn:
        """Fail, and stop a run that nobody will wait on any more; one that a retry will go on with is left alone."""
        ti = context["ti"]
        run_is_over = isinstance(error, DifyWorkflowRunFailed) and not isinstance(error, DifyWorkflowRunTimeout)
        is_final = isinstance(error, AirflowFailException) or ti.try_number > (ti.max_tries or 0)
        if self._running is not None and is_final and not run_is_over:
            self._stop(self._running)
        raise error

    def _stop(self, run: _Running) -> None:
        if not self.stop_on_failure:
            return
        if run.task_id is None:
            self.log.warning("Workflow run %s goes on: its task id, which Dify's stop route takes, is not known.",
                             run.workflow_run_id)  # fmt: skip
            return
        try:
            self.hook.stop_workflow_task(run.task_id, run.user)
        except DifyError as error:
            self.log.warning("Workflow run %s could not be stopped and goes on: %s", run.workflow_run_id, error)
        else:
            self.log.info(STOP_ASKED, run.workflow_run_id)


class _Running:
    """A run that was started: what is needed to find and to stop it."""

    def __init__(self, workflow_run_id: str, task_id: str | None, user: str) -> None:
        self.workflow_run_id = workflow_run_id
        self.task_id = task_id
        self.user = user


def default_user(ti: Any, try_number: int) -> str:
    """
    Name the try of a task as the ``user`` who starts a run, the same whenever it is asked for.

    :param ti: the task instance.
    :param try_number: the try.
    :return: text of at most 255 characters, which Dify's log shows and can be searched for.
    """
    map_index = "" if ti.map_index is None or ti.map_index < 0 else f"[{ti.map_index}]"
    user = f"airflow/{ti.dag_id}/{ti.task_id}{map_index}/{ti.run_id}/{try_number}"
    if len(user) <= MAX_USER_LENGTH:
        return user
    digest = hashlib.sha256(user.encode()).hexdigest()[:16]
    return f"{user[: MAX_USER_LENGTH - 17]}~{digest}"
