# SPDX-License-Identifier: Apache-2.0
"""The XComs of a task and of a finished workflow run, in one place for workers and the triggerer."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.airflow_versions import (
    CAN_END_FROM_TRIGGER,
    CAN_PUSH_NONE,
    XCOMS_ARE_STRICT_JSON,
    is_xcom_key,
)
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.models import WorkflowRun, one_line
from airflow_provider_dify.exceptions import DifyError, DifyFilesError, DifyOutputsError
from airflow_provider_dify.links.dify import RUN_LOG_KEY, DifyWorkflowRunLink
from airflow_provider_dify.runs.waiting import TriggerWait, Verdict

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger


RETURN_VALUE = "return_value"
WORKFLOW_RUN = "workflow_run"
WORKFLOW_RUN_ID = "workflow_run_id"
TASK_ID = "task_id"
RUN_LOG = RUN_LOG_KEY
# An output of one of these names is part of the return value only: the task's own XCom keeps its name.
RESERVED = frozenset({RETURN_VALUE, WORKFLOW_RUN, WORKFLOW_RUN_ID, TASK_ID, RUN_LOG})

# Airflow 3.3 stores 120 levels and can't read 200 again; 2.11 reads 400.
_DEEPEST = 100
# The keys by which Airflow (airflow.serialization.serde) knows an object that it has serialized, and those of old.
_OBJECT = frozenset({"__classname__", "__id__"})
_OLD_OBJECT = frozenset({"__type", "__var"})


def run_log_url(connection: DifyConnection, app_id: str) -> str:
    """Return the address of an app's log in Dify's console."""
    return f"{connection.console}/app/{app_id}/logs"


def xcoms_from_run(run: WorkflowRun, *, multiple_outputs: bool, facts: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the XComs of a task whose workflow run is over, the return value last: the outputs, ``{}`` for none."""
    outputs = run.outputs or {}
    names = [key for key in outputs if multiple_outputs and key and key not in RESERVED and is_xcom_key(key)]
    # Airflow 3.0 fails a task that pushes None.
    each = {key: outputs[key] for key in names if outputs[key] is not None or CAN_PUSH_NONE}
    return {WORKFLOW_RUN: {**run.without_payload(), **(facts or {})}, **each, RETURN_VALUE: outputs}


def check_outputs(run: WorkflowRun) -> None:
    """Check that a run's outputs can be XComs on this Airflow; else raise a DifyOutputsError."""
    outputs = run.outputs or {}
    for key, value in outputs.items():
        # With all of the names, because Airflow looks at these together.
        reason = xcom_problem({key: value}) or (_problem_of(outputs) if key in _OLD_OBJECT else None)
        if reason:
            raise DifyOutputsError(
                f"The output {one_line(key, 80)!r} {reason}, which Airflow cannot store as an XCom: Dify workflow run "
                f"{run.id} succeeded, but its outputs cannot be the task's return value. Change what the workflow's "
                "end node returns. The XCom workflow_run and the other outputs are there."
            )


def xcom_problem(value: Any) -> str | None:
    """
    Return why a JSON value can't be an XCom, as the end of a sentence; ``None`` if it can. Measured on Airflow 2.11 and
    3.0 to 3.3. From 3.0 on they send XComs as JSON to a database.
    """
    # Without recursion: it may be nested deeply.
    pending = [(value, 0)]
    while pending:
        item, depth = pending.pop()
        problem = _problem_of(item)
        if problem:
            return problem
        if isinstance(item, (dict, list)) and depth >= _DEEPEST:
            return f"is nested more than {_DEEPEST} levels deep"
        if isinstance(item, dict):
            pending.extend((part, depth + 1) for pair in item.items() for part in pair)
        elif isinstance(item, list):
            pending.extend((part, depth + 1) for part in item)
    return None


def _problem_of(item: Any) -> str | None:
    """Return what is wrong with one value, whatever it holds."""
    if isinstance(item, dict):
        # Airflow refuses such an object, or makes what it names of it when the XCom is read.
        is_object = not item.keys().isdisjoint(_OBJECT) or item.keys() >= _OLD_OBJECT
        return "holds a key that marks the serialized objects of Airflow" if is_object else None
    if not XCOMS_ARE_STRICT_JSON:
        return None
    if isinstance(item, float) and not math.isfinite(item):
        return f"holds the number {item}"
    if isinstance(item, int) and not -(2**63) <= item < 2**64:
        return "holds a whole number of more than 64 bits"
    if isinstance(item, str) and "\0" in item:
        return "holds a NUL character"
    if isinstance(item, str) and not _is_unicode(item):
        return "holds text with a lone surrogate"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def has_link(operator: Any) -> bool:
    """Return whether a running task has pushed the XCom of its link."""
    return getattr(operator, "run_log_url", None) is not None


class TaskXComs:
    """
    The XComs of one running task. The operator's links are there only while the link is known, because Airflow 3 reads
    and pushes each link of a task when it ends, and logs an error for one that is missing.
    """

    def __init__(self, operator: Any, context: Context) -> None:
        self._operator = operator
        self._ti: Any = context.get("ti")
        self._multiple_outputs = bool(operator.multiple_outputs)
        operator.operator_extra_links = ()

    def push_link(self, app_id: str | None) -> None:
        """Push the XCom that the link is read from, if the app is known."""
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
        self,
        run: WorkflowRun,
        verdict: Verdict,
        *,
        price: dict[str, str] | None = None,
        starts_again: bool = False,
        files_error: DifyFilesError | None = None,
    ) -> dict[str, Any]:
        """
        Push the XComs of a run that is over, and return its outputs. Raises what the verdict means after it has pushed
        ``workflow_run``, and a DifyOutputsError if an output can't be an XCom after it has pushed the others. The
        outputs are XComs, too, where their files could not be saved, which it raises then.
        """
        has_succeeded = not verdict.is_failure
        facts: dict[str, Any] = {**(price or {}), **({"failed_node": node} if (node := verdict.failed_node) else {})}
        xcoms = xcoms_from_run(run, multiple_outputs=self._multiple_outputs and has_succeeded, facts=facts)
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
        if files_error is not None:
            if self._pushes:
                self._ti.xcom_push(key=RETURN_VALUE, value=outputs)
            raise type(files_error)(
                f"{files_error} Dify workflow run {run.id} has succeeded, and its outputs are in the XComs. A retry "
                "starts no other run: it downloads again, while the files' URLs live (300 s)."
            )
        return outputs

    @property
    def _pushes(self) -> bool:
        return bool(self._operator.do_xcom_push) and self._ti is not None


@dataclass(frozen=True)
class TriggerXComs:
    """The XComs that a trigger pushes for its task."""

    task_instance: Any  # None where Airflow gave the trigger none
    wait: TriggerWait
    log: Logger

    async def push_link(self, run: WorkflowRun, connection: DifyConnection | None) -> None:
        """Push the XCom of the link, which no worker may ever see."""
        if not (self.wait.do_xcom_push and CAN_END_FROM_TRIGGER and run.app_id and connection is not None):
            return
        if self.task_instance is not None:
            await self._push({RUN_LOG: run_log_url(connection, run.app_id)}, run.id)

    async def push_outputs(self, run: WorkflowRun) -> bool:
        """
        Push the XComs of a run that succeeded; return whether that worked, else a worker has to end the task. Not as
        part of the event that ends the task: Airflow 3.2 keeps the XComs of that as text within JSON, so that the next
        task gets a text where it should get a dict.
        """
        if not self.wait.do_xcom_push:
            return True
        try:
            check_outputs(run)
        except DifyError:
            # Logged by a worker, in the task's own log.
            return False
        return await self._push(xcoms_from_run(run, multiple_outputs=self.wait.multiple_outputs), run.id)

    async def _push(self, xcoms: dict[str, Any], run_id: str) -> bool:
        from airflow.providers.common.compat.sdk import XCom
        from asgiref.sync import sync_to_async

        ti = self.task_instance
        try:
            for key, value in xcoms.items():
                await sync_to_async(XCom.set)(
                    key=key, value=value, dag_id=ti.dag_id, task_id=ti.task_id, run_id=ti.run_id, map_index=ti.map_index
                )
        except Exception:
            self.log.warning(
                "The XComs of Dify workflow run %s could not be pushed from the triggerer; a worker will do it.",
                run_id,
                exc_info=True,
            )
            return False
        return True
