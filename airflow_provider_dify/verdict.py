"""What one state of a workflow run means for the task that waits on it. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import Enum

from airflow_provider_dify.exceptions import DifyWorkflowRunFailed, DifyWorkflowRunTimeout
from airflow_provider_dify.models import WAITING_STATUSES, WorkflowRun, WorkflowRunStatus


class Outcome(str, Enum):
    """What a workflow run's state means for the task that waits on it."""

    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Verdict:
    """
    What one look at a workflow run means for the task that waits on it.

    :param outcome: keep waiting, done, or one of the two ways to fail.
    :param reason: a sentence for the log or the exception; quotes run, status, Dify's error, seconds and steps.
    :param is_warning: whether the reason deserves a warning although the task goes on.
    """

    outcome: Outcome
    reason: str
    is_warning: bool = False

    def raise_if_failed(self, run: WorkflowRun) -> None:
        """
        Raise what the verdict means.

        :param run: the run that was judged; the exception carries it.
        :raises DifyWorkflowRunFailed: if the run failed.
        :raises DifyWorkflowRunTimeout: if it is overdue.
        """
        if self.outcome is Outcome.FAILED:
            raise DifyWorkflowRunFailed(self.reason, run=run)
        if self.outcome is Outcome.TIMED_OUT:
            raise DifyWorkflowRunTimeout(self.reason, run=run)


def judge(
    run: WorkflowRun,
    *,
    now: datetime,
    fail_on_partial_success: bool = False,
    run_timeout: float | None = None,
) -> Verdict:
    """
    Say what a workflow run's state means for a task that waits on it. Pure: the same answer for the same arguments.

    :param run: the run as Dify told it.
    :param now: the present, aware.
    :param fail_on_partial_success: whether ``partial-succeeded`` is a failure; else a success with a warning.
    :param run_timeout: seconds after the run's own ``created_at`` from which a run that is not over counts as failed.
    :return: the verdict.
    """
    if run.status == WorkflowRunStatus.SUCCEEDED:
        return Verdict(Outcome.DONE, f"Dify workflow run {run.id} succeeded{_facts(run)}.")
    if run.status == WorkflowRunStatus.PARTIAL_SUCCEEDED:
        reason = (
            f"Dify workflow run {run.id} is partial-succeeded{_facts(run)}: at least one of its nodes failed and the "
            "node's error handling (default value or fail branch) took over."
        )
        if fail_on_partial_success:
            return Verdict(Outcome.FAILED, f"{reason} fail_on_partial_success is set.")
        return Verdict(Outcome.DONE, reason, is_warning=True)
    if run.status in (WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED):
        verb = "failed" if run.status == WorkflowRunStatus.FAILED else "was stopped"
        error = f": {run.error}" if run.error else "; Dify gave no error text."
        return Verdict(Outcome.FAILED, f"Dify workflow run {run.id} {verb} (status {run.status}){_facts(run)}{error}")
    if run.status not in WAITING_STATUSES and run.finished_at is not None:
        error = f": {run.error}" if run.error else "."
        return Verdict(
            Outcome.FAILED,
            f"Dify workflow run {run.id} finished with the status {str(run.status)!r}, which this version of "
            f"airflow-provider-dify does not know{_facts(run)}{error}",
        )
    if run_timeout is not None and run.created_at is not None:
        age = (now - run.created_at).total_seconds()
        if age > run_timeout:
            cause = (
                "It waits for a person at a Human Input node."
                if run.status == WorkflowRunStatus.PAUSED
                else "Such a record is usually orphaned: the server that ran it was killed, or it was stopped and Dify "
                "did not write that down. Look at the run in Dify's log and start a new one."
            )
            return Verdict(
                Outcome.TIMED_OUT,
                f"Dify workflow run {run.id} is still {run.status} {age:.0f} seconds after it was created "
                f"(run_timeout is {run_timeout:g} seconds). {cause}",
            )
    return Verdict(Outcome.WAIT, f"Dify workflow run {run.id} is {run.status}.")


def _facts(run: WorkflowRun) -> str:
    took = [] if run.elapsed_time is None else [f"after {run.elapsed_time:g} seconds"]
    steps = [] if run.total_steps is None else [f"{run.total_steps} step{'' if run.total_steps == 1 else 's'}"]
    return f" {' and '.join(took + steps)}" if took or steps else ""
