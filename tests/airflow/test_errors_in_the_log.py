"""What a failing task shows of its error: the cause first, and hardly a frame of this package."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Any

import pytest

import airflow_provider_dify
from tests.airflow.airflow_runs import run_dag, run_operator, run_sensor
from tests.dify_stand_in import DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries", "quick_resumption")

PACKAGE = str(Path(airflow_provider_dify.__file__).parent)
UNKNOWN = "11111111-2222-4333-8444-555555555555"


def inner_frames(error: BaseException) -> list[str]:
    """Return this package's frames of a task's error, after its method that Airflow calls."""
    assert error.__cause__ is None
    assert error.__suppress_context__
    frames = [f.name for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]
    return [name for name in frames if name not in ("execute", "execute_complete", "resume_execution")]


@pytest.mark.parametrize("way", [{}, {"deferrable": True}], ids=["poke", "deferrable"])
def test_a_sensors_error_has_no_inner_frames(way: dict[str, Any]) -> None:
    (error,) = run_sensor(workflow_run_id=UNKNOWN, not_found_grace=0, **way).raised["wait"]
    assert inner_frames(error) == ["_execute", "__exit__"]


@pytest.mark.parametrize("defer_after", [None, 0], ids=["worker", "deferrable"])
def test_an_operators_error_has_no_inner_frames(dify: DifyStandIn, defer_after: int | None) -> None:
    dify.starts.append(Start("run_streaming_failed"))
    way = {} if defer_after is None else {"deferrable": True, "defer_after": defer_after}
    (error,) = run_operator(**way).raised["run"]
    assert inner_frames(error) == ["__exit__"]


def test_a_batchs_error_has_no_inner_frames(dify: DifyStandIn) -> None:
    dify.starts.append(Start("run_streaming_failed"))
    body = "from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator\n"
    body += "DifyRunWorkflowBatchOperator(task_id='run', inputs=[{'query': 'a'}], on_failure_callback=raised)"
    (error,) = run_dag(body).raised["run"]
    assert inner_frames(error) == ["__exit__"]
