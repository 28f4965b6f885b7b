"""What one state of a workflow run means for the task that waits on it. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from enum import Enum

from airflow_provider_dify.api.models import WAITING_STATUSES, WorkflowRun, WorkflowRunStatus
from airflow_provider_dify.api.text import one_line
from airflow_provider_dify.exceptions import DifyWorkflowRunCannotSucceed, DifyWorkflowRunFailed, DifyWorkflowRunTimeout

# How Dify (1.13 to 1.16) ends a run whose Celery worker is shut down: as `stopped`, though nobody stopped it.
_WORKER_SHUT_DOWN = "the worker is shutting down"
# How Dify 1.16.0 and 1.16.1 end a run that went on after a Human Input node, 30 of 30 times. A stop goes by its status,
# never by its text: this adds advice alone.
_STREAM_CLOSED = "Client response stream closed before app execution completed"
# The other text that it has for that, and has for a stop, too.
_STOPPED = "App task was stopped"


class Outcome(str, Enum):
    """What a workflow run's state means for the task that waits on it."""

    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Verdict:
    """What one look at a workflow run means for the task that waits on it."""

    outcome: Outcome
    # A sentence for the log or the exception: the cause first, then run, status, seconds and steps.
    reason: str
    # Although the task goes on.
    is_warning: bool = False
    # Whether another run with the same inputs may succeed where this one failed.
    can_be_repeated: bool = False
    # Its id, title and type, where the events named it.
    failed_node: dict[str, str] | None = None

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


def judge(
    run: WorkflowRun, *, now: datetime, fail_on_partial_success: bool = False, run_timeout: float | None = None
) -> Verdict:
    """Return what a run's state means for a task that waits; ``run_timeout`` is seconds after its ``created_at``."""
    if run.status == WorkflowRunStatus.SUCCEEDED:
        return Verdict(Outcome.DONE, f"Dify workflow run {run.id} succeeded{_facts(run)}.")
    if run.status == WorkflowRunStatus.PARTIAL_SUCCEEDED:
        return _judge_partial_success(run, fail_on_partial_success)
    if run.status in (WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED):
        return _judge_failure(run)
    if run.status not in WAITING_STATUSES and run.finished_at is not None:
        return Verdict(
            Outcome.FAILED,
            f"{_error(run)} Dify workflow run {run.id} finished with the status {str(run.status)!r}, "
            f"which this version of airflow-provider-dify does not know{_facts(run)}.",
            can_be_repeated=True,
        )
    if run_timeout is not None and run.created_at is not None:
        age = (now - run.created_at).total_seconds()
        if age > run_timeout:
            return Verdict(Outcome.TIMED_OUT, _overdue(run, age, run_timeout))
    waits = " and waits for a person" if run.status == WorkflowRunStatus.PAUSED else ""
    return Verdict(Outcome.WAIT, f"Dify workflow run {run.id} is {run.status}{waits}.")


def _judge_partial_success(run: WorkflowRun, is_failure: bool) -> Verdict:
    reason = (
        "At least one node failed and its error handling (default value or fail branch) took over: "
        f"Dify workflow run {run.id} is partial-succeeded{_facts(run)}."
    )
    if is_failure:
        return Verdict(Outcome.FAILED, f"{reason} fail_on_partial_success is set.", can_be_repeated=True)
    return Verdict(Outcome.DONE, reason, is_warning=True)


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
