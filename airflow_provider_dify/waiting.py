"""What a series of polls means for a wait: which trouble is waited out, which ends it, and what is worth a line."""

from __future__ import annotations

import random
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.airflow_versions import push_each
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.models import WorkflowRun, WorkflowRunStatus
from airflow_provider_dify.verdict import Outcome, Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger


# Said where the stop route was asked: it answers success to anything, and the record often stays as it was.
STOP_ASKED = "Asked Dify to stop workflow run %s. Whether it did may not show: its record can stay running for ever."


@dataclass(frozen=True)
class WaitPolicy:
    """
    What a wait puts up with.

    :param fail_on_partial_success: whether ``partial-succeeded`` fails the wait.
    :param not_found_grace: seconds from the first poll during which an unknown run is waited for.
    :param run_timeout: seconds since the run's own ``created_at`` after which a run that is not over fails the wait.
    :param max_consecutive_failures: polls in a row that may fail for a passing reason; ``None`` for any number.
    """

    fail_on_partial_success: bool = False
    not_found_grace: float = 0.0
    run_timeout: float | None = None
    max_consecutive_failures: int | None = 5


class WaitEnd(str, Enum):
    """How a wait on the triggerer ended, as its event tells the worker."""

    RUN_IS_OVER = "run_is_over"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


class RunWait:
    """
    One wait on one workflow run: is told what each poll brought, and says whether to go on.

    :param workflow_run_id: the run.
    :param policy: what the wait puts up with.
    :param log: where changes of status and failed polls are told.
    :param first_poll: when the wait first polled, aware; now by default.
    :param on_first_look: told the run once, as soon as a poll has brought it.
    """

    def __init__(
        self,
        workflow_run_id: str,
        policy: WaitPolicy,
        *,
        log: Logger,
        first_poll: datetime | None = None,
        on_first_look: Callable[[WorkflowRun], None] | None = None,
    ) -> None:
        self.workflow_run_id = workflow_run_id
        self.policy = policy
        self.first_poll = first_poll or datetime.now(timezone.utc)
        self.status: WorkflowRunStatus | str | None = None
        self.status_since: datetime | None = None
        self.consecutive_failures = 0
        self._log = log
        self._on_first_look = on_first_look

    def look_at(self, run: WorkflowRun) -> Verdict:
        """
        Take in the run that a poll brought, and tell a change of its status.

        :param run: the run.
        :return: what it means for the wait.
        """
        self.consecutive_failures = 0
        if self._on_first_look is not None:
            self._on_first_look(run)
            self._on_first_look = None
        verdict = judge(
            run,
            now=datetime.now(timezone.utc),
            fail_on_partial_success=self.policy.fail_on_partial_success,
            run_timeout=self.policy.run_timeout,
        )
        if self._is_new(run.status):
            if verdict.is_warning:
                self._log.warning("%s", verdict.reason)
            elif verdict.outcome in (Outcome.WAIT, Outcome.DONE):
                # A failure is told by the exception that it becomes.
                self._log.info("%s", verdict.reason)
        return verdict

    def put_up_with(self, error: DifyConnectionError | DifyWorkflowRunNotFound) -> None:
        """
        Take in a poll that failed: return if the wait goes on, raise what ends it.

        :param error: why the poll failed.
        :raises DifyWorkflowRunNotFound: once ``not_found_grace`` is over.
        :raises DifyConnectionError: once more than ``max_consecutive_failures`` polls in a row have failed.
        """
        if isinstance(error, DifyWorkflowRunNotFound):
            self.consecutive_failures = 0
            self._put_up_with_unknown_run(error)
            return
        self.consecutive_failures += 1
        allowed = self.policy.max_consecutive_failures
        if allowed is not None and self.consecutive_failures > allowed:
            raise error
        self._log.warning(
            "A poll of Dify workflow run %s failed, %d in a row%s: %s",
            self.workflow_run_id,
            self.consecutive_failures,
            "" if allowed is None else f" of at most {allowed}",
            error,
        )

    def last_seen(self) -> str:
        """
        Say how the run stood when it was last seen, for a wait that ends before the run does.

        :return: a sentence with the run, its status and since when that was seen.
        """
        if self.status is None or self.status_since is None:
            return f"Dify workflow run {self.workflow_run_id} was never seen: no poll was answered."
        return (
            f"Dify workflow run {self.workflow_run_id} was not over: its last status was {self.status}, "
            f"seen since {self.status_since.isoformat(timespec='seconds')}."
        )

    def _is_new(self, status: WorkflowRunStatus | str) -> bool:
        if status == self.status:
            return False
        self.status = status
        self.status_since = datetime.now(timezone.utc)
        return True

    def _put_up_with_unknown_run(self, error: DifyWorkflowRunNotFound) -> None:
        grace = self.policy.not_found_grace
        waited = (datetime.now(timezone.utc) - self.first_poll).total_seconds()
        if waited >= grace:
            if not grace:
                raise error
            raise DifyWorkflowRunNotFound(
                f"{error} It was still unknown {waited:.0f} seconds after the first poll "
                f"(not_found_grace is {grace:g} seconds).",
                workflow_run_id=error.workflow_run_id,
            ) from error
        if self._is_new("unknown to Dify"):
            self._log.info(
                "Dify does not know workflow run %s yet; waiting for it until %g seconds after the first poll.",
                self.workflow_run_id,
                grace,
            )


def hand_over(run: WorkflowRun, verdict: Verdict, context: Context, *, do_xcom_push: bool) -> dict[str, Any]:
    """
    End a task as its run ended.

    :param run: the run, which is over.
    :param verdict: what that means.
    :param context: the running task's context.
    :param do_xcom_push: whether to push XComs.
    :return: the task's return value: the run's outputs.
    :raises DifyWorkflowRunFailed: if the run failed or is overdue.
    """
    if do_xcom_push and (ti := context.get("ti")):
        ti.xcom_push(key="workflow_run", value=run.without_payload())
    verdict.raise_if_failed(run)
    outputs = run.outputs or {}
    if do_xcom_push:
        push_each(outputs, context)
    return outputs


def error_of_event(event: Any, timed_out: Callable[[str], Exception]) -> Exception | None:
    """
    Give the error that a trigger's event stands for.

    :param event: what the trigger told.
    :param timed_out: makes the error for a wait whose time was over, out of what was last seen.
    :return: the error; ``None`` if the run is over and to be read again.
    """
    # What is no dict is the event that ends a task, which only a test run hands to its task.
    if not isinstance(event, dict) or event.get("end") == WaitEnd.RUN_IS_OVER:
        return None
    message = str(event.get("message"))
    if event.get("end") == WaitEnd.TIMED_OUT:
        return timed_out(message)
    return DifyError.from_event(event.get("error") or {"text": message})


def spread(interval: float, polls: int, *, exponential_backoff: bool = False, max_wait: float | None = None) -> float:
    """
    Say how long to wait between two polls.

    :param interval: seconds between polls.
    :param polls: polls so far.
    :param exponential_backoff: double the interval with each poll, with jitter, as Airflow's sensors do.
    :param max_wait: seconds that a doubled interval is cut at.
    :return: seconds.
    """
    if not exponential_backoff:
        return interval
    # From half the interval, as Airflow counts; the exponent is bounded only so that it can't overflow.
    doubled = interval * 2.0 ** (min(polls, 64) - 2) * random.uniform(1, 2)  # noqa: S311
    return doubled if max_wait is None else min(doubled, max_wait)


def whole_number(name: str, value: Any) -> int:
    """
    Check an argument that counts something.

    :param name: the argument, for the message.
    :param value: a whole number, not below 0.
    :return: the number.
    :raises DifyConfigurationError: if it is anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise DifyConfigurationError(f"{name} must be a whole number, not below 0: {value!r}")
    return value


def seconds(name: str, value: Any) -> float:
    """
    Check an argument that is a length of time.

    :param name: the argument, for the message.
    :param value: seconds, or a ``timedelta``.
    :return: seconds.
    :raises DifyConfigurationError: if it is neither, or negative.
    """
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise DifyConfigurationError(f"{name} must be a number of seconds or a timedelta, not below 0: {value!r}")
    return float(value)
