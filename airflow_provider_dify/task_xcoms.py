"""The XComs and the link of a task on a worker, pushed as soon as they are known."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_provider_dify.links.dify import DifyWorkflowRunLink
from airflow_provider_dify.models import WorkflowRun
from airflow_provider_dify.verdict import Verdict
from airflow_provider_dify.xcoms import (
    RETURN_VALUE,
    RUN_LOG,
    TASK_ID,
    WORKFLOW_RUN_ID,
    check_outputs,
    run_log_url,
    xcom_problem,
    xcoms_from_run,
)

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context


def has_link(operator: Any) -> bool:
    """Return whether a running task has pushed the XCom of its link."""
    return getattr(operator, "run_log_url", None) is not None


class TaskXComs:
    """
    The XComs of one running task.

    :param operator: the operator or sensor; its links are there only while the link is known, because Airflow 3 reads
        and pushes each link of a task when it ends, and logs an error for one that is missing.
    :param context: the running task's context.
    """

    def __init__(self, operator: Any, context: Context) -> None:
        self._operator = operator
        self._ti: Any = context.get("ti")
        self._multiple_outputs = bool(operator.multiple_outputs)
        operator.operator_extra_links = ()

    def on_run(self, run: WorkflowRun) -> None:
        """Push the link, as soon as a poll has brought the run."""
        self.push_link(run.app_id)

    def push_link(self, app_id: str | None) -> None:
        """
        Push the XCom that the link is read from.

        :param app_id: the app's UUID; ``None`` where it is not known.
        """
        if app_id is None or not self._pushes:
            return
        url = run_log_url(self._operator.hook.connection, app_id)
        self._operator.run_log_url = url
        self._operator.operator_extra_links = (DifyWorkflowRunLink(),)
        self._ti.xcom_push(key=RUN_LOG, value=url)

    def push_ids(self, workflow_run_id: str, task_id: str | None) -> None:
        """Push the ids of a run as soon as they are known; ``None`` for a task's id that isn't."""
        if not self._pushes:
            return
        self._ti.xcom_push(key=WORKFLOW_RUN_ID, value=workflow_run_id)
        if task_id:
            self._ti.xcom_push(key=TASK_ID, value=task_id)

    def push_and_return(
        self, run: WorkflowRun, verdict: Verdict, *, price: dict[str, str] | None = None, starts_again: bool = False
    ) -> dict[str, Any]:
        """
        Push the XComs of a run that is over, and return the task's return value.

        :param run: the run.
        :param verdict: what it means.
        :param price: what the run cost, where that is known.
        :param starts_again: whether a retry of the task starts another run.
        :return: the run's outputs.
        :raises DifyWorkflowRunFailed: if the run failed or is overdue; ``workflow_run`` is pushed then, too.
        :raises DifyOutputsError: if an output can't be an XCom; the others are pushed.
        """
        has_succeeded = not verdict.is_failure
        xcoms = xcoms_from_run(run, multiple_outputs=self._multiple_outputs and has_succeeded, price=price)
        outputs: dict[str, Any] = xcoms.pop(RETURN_VALUE)
        if self._pushes:
            for key, value in xcoms.items():
                if not (xcom_problem(key) or xcom_problem(value)):
                    self._ti.xcom_push(key=key, value=value)
        verdict.raise_if_failed(run, starts_again=starts_again)
        if self._pushes:
            check_outputs(run)
            # All are pushed: Airflow would push one again that has the name of an XCom of ours.
            self._ti.task.multiple_outputs = False
        return outputs

    @property
    def _pushes(self) -> bool:
        return bool(self._operator.do_xcom_push) and self._ti is not None
