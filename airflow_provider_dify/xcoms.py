"""The XComs of a finished workflow run, in one place for workers and the triggerer."""

from __future__ import annotations

import math
from typing import Any

from airflow_provider_dify.airflow_versions import CAN_PUSH_NONE, XCOMS_ARE_STRICT_JSON, is_xcom_key
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyOutputsError
from airflow_provider_dify.excerpts import one_line
from airflow_provider_dify.models import WorkflowRun

RETURN_VALUE = "return_value"
WORKFLOW_RUN = "workflow_run"
WORKFLOW_RUN_ID = "workflow_run_id"
TASK_ID = "task_id"
# With a dash, which few outputs have in their name.
RUN_LOG = "dify-run-log"
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


def xcoms_from_run(run: WorkflowRun, *, multiple_outputs: bool, price: dict[str, str] | None = None) -> dict[str, Any]:
    """
    Return the XComs of a task whose workflow run is over.

    :param run: the run.
    :param multiple_outputs: whether each output is an XCom of its own.
    :param price: ``total_price`` and ``currency``, where they are known.
    :return: values by key, the return value last. It is the outputs, ``{}`` where there are none.
    """
    outputs = run.outputs or {}
    names = [key for key in outputs if multiple_outputs and key and key not in RESERVED and is_xcom_key(key)]
    # Airflow 3.0 fails a task that pushes None.
    each = {key: outputs[key] for key in names if outputs[key] is not None or CAN_PUSH_NONE}
    return {WORKFLOW_RUN: {**run.without_payload(), **(price or {})}, **each, RETURN_VALUE: outputs}


def check_outputs(run: WorkflowRun) -> None:
    """
    Check that a run's outputs can be XComs on this Airflow.

    :param run: the run.
    :raises DifyOutputsError: if one can't; names the output and the reason.
    """
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
    Return why a JSON value can't be an XCom.

    Measured on Airflow 2.11 and 3.0 to 3.3. From 3.0 on they send XComs as JSON to a database.

    :param value: as parsed from JSON.
    :return: what is wrong with it, as the end of a sentence; ``None`` for nothing.
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
