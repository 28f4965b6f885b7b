"""Traces of a Dag run: one session for all of its Dify runs."""

from __future__ import annotations

import pytest

from tests.airflow.airflow_runs import run_dag
from tests.dify_stand_in import DifyStandIn

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")


def test_all_runs_of_a_dag_run_have_its_id_as_their_session(dify: DifyStandIn) -> None:
    result = run_dag(
        """
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        session = "{{ run_id }}"
        one = DifyRunWorkflowOperator(
            task_id="one", inputs={}, trace_id="{{ ti.task_id }}-{{ ti.try_number }}", trace_session_id=session
        )
        many = DifyRunWorkflowBatchOperator(task_id="many", inputs=[{}, {}], trace_session_id=session)

        @task
        def name(run_id=None):
            received("run_id", run_id)

        one >> many >> name()
        """
    )
    assert result.state == "success"
    starts = [request.headers for request in dify.requests if request.method == "POST"]
    assert [start.get("X-Trace-Session-Id") for start in starts] == [result.received["run_id"]] * 3
    assert [start.get("X-Trace-Id") for start in starts] == ["one-1", None, None]


def test_a_session_that_renders_to_none_that_dify_takes_fails_the_batch_before_any_start(dify: DifyStandIn) -> None:
    result = run_dag(
        """
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        DifyRunWorkflowBatchOperator(
            task_id="many", inputs=[{}], trace_session_id="{{ '' }}", retries=2, on_failure_callback=raised
        )
        """
    )
    assert result.tries["many"] == 1
    assert "trace_session_id must be text of 1 to 200" in str(result.raised["many"][0])
    assert [request for request in dify.requests if request.method == "POST"] == []
