# SPDX-License-Identifier: Apache-2.0
"""What a run's state means for a wait, and a series of polls: what ends the wait, and what is worth a line. No I/O."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timedelta, timezone
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_dify.api.models import GOOD_STATUSES, WorkflowRun, WorkflowRunStatus, one_line
from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunCannotSucceed,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
)

if TYPE_CHECKING:
    from airflow.sdk.types import Logger


# How Dify (1.13 to 1.16) ends a run whose Celery worker is shut down: as `stopped`, though nobody stopped it.
_WORKER_SHUT_DOWN = "the worker is shutting down"
# How Dify 1.16.0 and 1.16.1 end a run that went on after a Human Input node, 30 of 30 times. A stop goes by its status,
# never by its text: this adds advice alone.
_STREAM_CLOSED = "Client response stream closed before app execution completed"
# The other text that it has for that, and has for a stop, too.
_STOPPED = "App task was stopped"


class Outcome(str, Enum):
    """What a workflow run's state means for the task that waits for it."""

    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Verdict:
    """What one look at a workflow run means for the task that waits for it."""

    outcome: Outcome
    reason: str  # a sentence for the log or the exception: the cause first, then run, status, seconds and steps
    is_warning: bool = False  # although the task goes on
    can_be_repeated: bool = False  # whether another run with the same inputs may succeed where this one failed
    failed_node: dict[str, str] | None = None  # its id, title and type, where the events named it

    @property
    def is_failure(self) -> bool:
        """Whether the task fails."""
        return self.outcome in (Outcome.FAILED, Outcome.TIMED_OUT)

    def raise_if_failed(self, run: WorkflowRun, *, starts_again: bool = False) -> None:
        """Raise what the verdict means; ``starts_again`` is whether a retry of the task starts another run."""
        if self.outcome is Outcome.FAILED:
            retryable = starts_again and self.can_be_repeated
            failure = DifyWorkflowRunFailed if retryable else DifyWorkflowRunCannotSucceed
            raise failure(self.reason, run=run, failed_node=self.failed_node)
        if self.outcome is Outcome.TIMED_OUT:
            raise DifyWorkflowRunTimeout(self.reason, run=run)

    def because_of(self, node: str | None, facts: dict[str, str] | None = None) -> Verdict:
        """Add the node that failed to a failure's reason, such as ``Node 'Ask' (llm) failed: no such model.``"""
        if node is None or self.outcome is not Outcome.FAILED:
            return self
        name, _, error = node.partition(" failed: ")
        # A node's error is usually the run's, too, which is not said twice.
        is_the_same = bool(error) and self.reason.startswith(error.rstrip("."))
        reason = f"{name} failed: {self.reason}" if is_the_same else f"{node} {self.reason}"
        return replace(self, reason=reason, failed_node=facts)


def counts_as_failed(status: WorkflowRunStatus | str, fail_on_partial_success: bool) -> bool:
    """Return whether a run that ended with this status fails its task, or its row of a batch."""
    return status not in GOOD_STATUSES or (fail_on_partial_success and status == WorkflowRunStatus.PARTIAL_SUCCEEDED)


def _judge_failure(run: WorkflowRun) -> Verdict:
    error = run.error or ""
    if run.status == WorkflowRunStatus.FAILED:
        return Verdict(
            Outcome.FAILED, f"{_error(run)} Dify workflow run {run.id} failed{_facts(run)}.", can_be_repeated=True
        )
    advice = ""
    # A run that a person has stopped has no outputs.
    if _STREAM_CLOSED in error or (_STOPPED in error and run.outputs):
        advice = (
            " Dify 1.16.0 and 1.16.1 end runs like this that were paused for a person, although their nodes ran to the "
            "end. Its outputs may be complete: see the exception's run, or the run in Dify's console."
        )
    return Verdict(
        Outcome.FAILED,
        f"{_error(run)} Dify workflow run {run.id} was stopped{_facts(run)}.{advice}",
        can_be_repeated=_WORKER_SHUT_DOWN in error,
    )


def _overdue(run: WorkflowRun, age: float, run_timeout: float) -> str:
    cause = (
        "It waits for a person at a Human Input node."
        if run.status == WorkflowRunStatus.PAUSED
        else "Such a record is usually orphaned: the server that ran it was killed, or it was stopped and Dify did not "
        "write that down. Look at the run in Dify's log and start a new one."
    )
    return (
        f"Dify workflow run {run.id} is still {run.status} {age:.0f} seconds after it was created "
        f"(run_timeout is {run_timeout:g} seconds). {cause}"
    )


def _error(run: WorkflowRun) -> str:
    if not run.error:
        return "Dify gave no error text."
    text = one_line(run.error)
    return text if text.endswith((".", "!", "?", "…")) else f"{text}."


def _facts(run: WorkflowRun) -> str:
    took = [] if run.elapsed_time is None else [f"after {run.elapsed_time:.1f} seconds"]
    steps = [] if run.total_steps is None else [f"{run.total_steps} step{'' if run.total_steps == 1 else 's'}"]
    return f" {' and '.join(took + steps)}" if took or steps else ""


E = TypeVar("E", bound=BaseException)

# Seconds between two lines of a wait that goes on.
LIFE_INTERVAL = 60.0


# For so many seconds a run is looked for that may be there: some servers write runs late.
NOT_FOUND_GRACE = 60.0
WEEK_SECONDS = 7 * 24 * 3600.0


@dataclass(frozen=True)
class WaitArguments:
    """
    How a task waits for a run, as its operator or sensor was told; times in seconds.

    :param poll_interval: seconds between polls.
    :param fail_on_partial_success: whether ``partial-succeeded`` fails the wait.
    :param not_found_grace: seconds from the first poll during which an unknown run is polled again.
    :param run_timeout: seconds since the run's own ``created_at`` after which a run that is not over fails the wait.
    :param max_consecutive_failures: polls in a row that may fail for a passing reason; ``None`` for any number.
    """

    poll_interval: float = 10.0
    fail_on_partial_success: bool = False
    not_found_grace: float = 0.0
    run_timeout: float | None = None
    max_consecutive_failures: int | None = 5

    @classmethod
    def of_task(cls, task: Any, **given: Any) -> WaitArguments:
        """Return how an operator or sensor waits, by its attributes of the same names, but for what is given."""
        names = {known.name for known in fields(WaitArguments)} - given.keys()
        return WaitArguments(**given, **{name: getattr(task, name) for name in names})

    def judge(self, run: WorkflowRun, now: datetime | None = None) -> Verdict:
        """Return what a run's state means for a task that waits like this."""
        if run.status == WorkflowRunStatus.PARTIAL_SUCCEEDED:
            reason = (
                "At least one node failed and its error handling (default value or fail branch) took over: "
                f"Dify workflow run {run.id} is partial-succeeded{_facts(run)}."
            )
            if counts_as_failed(run.status, self.fail_on_partial_success):
                return Verdict(Outcome.FAILED, f"{reason} fail_on_partial_success is set.", can_be_repeated=True)
            return Verdict(Outcome.DONE, reason, is_warning=True)
        if run.status in GOOD_STATUSES:
            return Verdict(Outcome.DONE, f"Dify workflow run {run.id} {run.status}{_facts(run)}.")
        if run.status in (WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED):
            return _judge_failure(run)
        if run.is_over:
            return Verdict(
                Outcome.FAILED,
                f"{_error(run)} Dify workflow run {run.id} finished with the status {str(run.status)!r}, "
                f"which this version of airflow-provider-dify does not know{_facts(run)}.",
                can_be_repeated=True,
            )
        if self.run_timeout is not None and run.created_at is not None:
            age = ((now or datetime.now(timezone.utc)) - run.created_at).total_seconds()
            if age > self.run_timeout:
                return Verdict(Outcome.TIMED_OUT, _overdue(run, age, self.run_timeout))
        waits = " and waits for a person" if run.status == WorkflowRunStatus.PAUSED else ""
        return Verdict(Outcome.WAIT, f"Dify workflow run {run.id} is {run.status}{waits}.")


@dataclass(frozen=True)
class TriggerWait(WaitArguments):
    """
    How a trigger waits; the arguments of :class:`~airflow_provider_dify.triggers.dify.DifyWorkflowRunTrigger`.

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
    :param end_from_trigger: end the task on the triggerer when the run succeeded, with its outputs as XComs.
    :param do_xcom_push: whether the task pushes XComs.
    :param has_link: whether a worker has pushed the XCom of the link.
    :param multiple_outputs: whether each output is an XCom of its own; only used with ``end_from_trigger``.
    :param stop_task_id: Dify's id of the task to stop if a user ends the waiting task (Airflow 3.3 and later).
    :param stop_user: the ``user`` that started the run; ``None`` for a run that goes on.
    :param search: for a start that was not named yet: what to look for in Dify's log, as
        :meth:`~airflow_provider_dify.runs.log.RunSearch.serialize` returns it.
    :param was_seen: whether Dify has shown or named the run before.
    """

    deadline: float | None = None
    first_poll: float | None = None
    exponential_backoff: bool = False
    max_wait: float | None = None
    end_from_trigger: bool = False
    do_xcom_push: bool = True
    has_link: bool = False
    multiple_outputs: bool = True
    stop_task_id: str | None = None
    stop_user: str | None = None
    search: dict[str, Any] | None = None
    was_seen: bool = False

    @classmethod
    def of(cls, arguments: WaitArguments, **more: Any) -> TriggerWait:
        """Return the wait of a task that waits like this, and of which this is known, too."""
        return cls(**vars(arguments), **more)

    def interval_after(self, polls: int) -> float:
        """Return the seconds to the next poll; doubled with each, up to ``max_wait``, as Airflow's sensors may do."""
        if not self.exponential_backoff:
            return self.poll_interval
        # From half the interval, as Airflow counts; the exponent is bounded only so that it can't overflow.
        doubled = self.poll_interval * 2.0 ** (min(polls, 64) - 2) * random.uniform(1, 2)  # noqa: S311
        return doubled if self.max_wait is None else min(doubled, self.max_wait)

    def serialize(self) -> dict[str, Any]:
        """Return the arguments: text, numbers, booleans, null and the search's dict only, and no secret."""
        return asdict(self)


class WaitEnd(str, Enum):
    """How a wait on the triggerer ended, as its event says to the worker."""

    RUN_IS_OVER = "run_is_over"
    TIMED_OUT = "timed_out"
    FAILED = "failed"


@dataclass(frozen=True)
class Deadline:
    """When a wait gives up: in epoch seconds; how long it was to be, and whose timeout it is, is for messages."""

    at: float
    seconds: float
    whose: str = "operator's"

    @classmethod
    def after(cls, seconds: float, whose: str = "operator's") -> Deadline:
        """Return the deadline that is so many seconds from now."""
        return cls(time.time() + seconds, seconds, whose)

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self.at - time.time())

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return time.time() >= self.at

    async def pause(self, seconds: float) -> None:
        """Pause, but not beyond the deadline."""
        await asyncio.sleep(max(0.0, min(seconds, self.left)))

    def error(self, last_status: str) -> DifyWorkflowRunTimeout:
        """Return the error for a wait that came to its deadline before the run was over."""
        return DifyWorkflowRunTimeout(f"The {self.whose} timeout of {self.seconds:g} seconds is over. {last_status}")


class RunWait:
    """One wait on one workflow run: takes what each poll brought, and returns or raises what it means."""

    def __init__(
        self,
        workflow_run_id: str,
        arguments: WaitArguments,
        *,
        log: Logger,
        first_poll: datetime | None = None,
        on_first_run: Callable[[WorkflowRun], None] | None = None,
        was_seen: bool = False,
    ) -> None:
        self.workflow_run_id = workflow_run_id
        self.arguments = arguments
        self._first_poll = first_poll
        self.status: WorkflowRunStatus | str | None = None
        self.status_since: datetime | None = None
        self.consecutive_failures = 0
        self.was_seen = was_seen
        self._times_unknown = 0
        self._last_line: datetime | None = None
        self._log = log
        self._on_first_run = on_first_run

    @property
    def first_poll(self) -> datetime:
        """When the wait first polled."""
        if self._first_poll is None:
            self._first_poll = datetime.now(timezone.utc)
        return self._first_poll

    def on_poll(self, run: WorkflowRun) -> Verdict:
        """Take the run that a poll brought, log a change of its status, and return what it means for the wait."""
        now = max(datetime.now(timezone.utc), self.first_poll)
        self.consecutive_failures = 0
        self.was_seen = True
        self._times_unknown = 0
        if self._on_first_run is not None:
            self._on_first_run(run)
            self._on_first_run = None
        verdict = self.arguments.judge(run, now)
        if self._is_new(run.status):
            self._last_line = now
            if verdict.is_warning:
                self._log.warning("%s", verdict.reason)
            elif verdict.outcome in (Outcome.WAIT, Outcome.DONE):
                # A failure is logged with the exception that it becomes.
                self._log.info("%s", verdict.reason)
        elif verdict.outcome is Outcome.WAIT and (now - (self._last_line or now)).total_seconds() >= LIFE_INTERVAL:
            self._last_line = now
            self._log.info("%s", f"{verdict.reason.removesuffix('.')}, {_life(run, now)}.")
        return verdict

    def on_failed_poll(self, error: DifyConnectionError | DifyWorkflowRunNotFound) -> None:
        """Take a poll that failed; raise its error after ``not_found_grace``, or ``max_consecutive_failures``."""
        if isinstance(error, DifyWorkflowRunNotFound):
            self.consecutive_failures = 0
            self._times_unknown += 1
            if self.was_seen and self._times_unknown == 1:
                # Once may be a slip: of a replica that lags behind, or of a key that is being changed.
                self._log.warning("Dify has named this run before; asking once more: %s", error)
                return
            self._on_unknown_run(error)
            return
        self.consecutive_failures += 1
        allowed = self.arguments.max_consecutive_failures
        if allowed is not None and self.consecutive_failures > allowed:
            raise error
        self._log.warning(
            "A poll of Dify workflow run %s failed, %d in a row%s: %s",
            self.workflow_run_id,
            self.consecutive_failures,
            "" if allowed is None else f" of at most {allowed}",
            error,
        )

    def describe_last_status(self) -> str:
        """Return how the run stood when it was last seen, in a sentence, for a wait that ends before the run does."""
        if self.status is None or self.status_since is None:
            return f"Dify workflow run {self.workflow_run_id} was never seen: no poll succeeded."
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

    def _on_unknown_run(self, error: DifyWorkflowRunNotFound) -> None:
        grace = self.arguments.not_found_grace
        # Read before the present, because this may be the first poll.
        began = self.first_poll
        elapsed = (datetime.now(timezone.utc) - began).total_seconds()
        if elapsed >= grace:
            if not grace:
                raise error
            raise DifyWorkflowRunNotFound(
                f"{error} It was still unknown {elapsed:.0f} seconds after the first poll "
                f"(not_found_grace is {grace:g} seconds).",
                workflow_run_id=error.workflow_run_id,
            ) from error
        if self._is_new("unknown to Dify"):
            self._log.info(
                "Dify does not know workflow run %s yet; polling it until %g seconds after the first poll.",
                self.workflow_run_id,
                grace,
            )


def _life(run: WorkflowRun, now: datetime) -> str:
    age = f"{max(0.0, (now - run.created_at).total_seconds()):.0f} seconds after its creation" if run.created_at else ""
    steps = f"{run.total_steps} steps so far" if run.total_steps else ""
    return ", ".join(filter(None, (age, steps))) or "as before"


def error_from_event(event: Any, timed_out: Callable[[str], E]) -> E | DifyError | None:
    """Return the error that a trigger's event stands for, ``timed_out`` a wait's; ``None`` to read the run again."""
    # What is no dict is the event that ends a task, which only a test run hands to its task.
    if not isinstance(event, dict) or event.get("end") == WaitEnd.RUN_IS_OVER:
        return None
    message = str(event.get("message"))
    if event.get("end") == WaitEnd.TIMED_OUT:
        return timed_out(message)
    return DifyError.from_event(event.get("error") or {"text": message})


def deferral_end(deadline: float, ti: Any, execution_timeout: timedelta | None) -> float:
    """Return when a deferral ends, in epoch seconds: by its own deadline, or by the task's ``execution_timeout``."""
    # Airflow 3 does not look at that while a task is deferred.
    if execution_timeout is None:
        return deadline
    # The start is not known in dag.test() of Airflow 2.
    started: datetime = getattr(ti, "start_date", None) or datetime.now(timezone.utc)
    return min(deadline, (started + execution_timeout).timestamp())


def is_limited(execution_timeout: timedelta | None, timeout: float) -> bool:
    """Return whether a deferral ends by the task's ``execution_timeout``, before its own timeout (seconds) is over."""
    return execution_timeout is not None and execution_timeout.total_seconds() < timeout
