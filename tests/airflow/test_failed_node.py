"""The node that failed, for a callback that routes alerts and for the next task."""

from __future__ import annotations

import pickle

import pytest

from airflow_provider_dify.exceptions import DifyWorkflowRunFailed
from tests.airflow.airflow_runs import run_dag, run_sensor
from tests.dify_stand_in import DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries", "quick_resumption")

NODES = {"1.12.1": "http", "1.17": "fail"}


@pytest.fixture
def default_dialect() -> str:
    return "1.17"


OPERATOR = """
run = DifyRunWorkflowOperator(
    task_id="run",
    inputs={{}},
    poll_interval=0.05,
    on_failure_callback=raised,
    on_retry_callback=raised,
    **{arguments!r},
)
"""


@pytest.mark.parametrize("arguments", [{}, {"deferrable": True}, {"retries": 1, "retry_delay": 0}])
@pytest.mark.parametrize("dialect", NODES, indirect=True)
def test_error_and_xcom_name_the_node_that_failed(
    dify: DifyStandIn, dialect: str, arguments: dict[str, object]
) -> None:
    dify.starts.extend([Start("run_streaming_failed"), Start("run_streaming_failed")])
    result = run_dag(OPERATOR.format(arguments=arguments))
    node = {"id": NODES[dialect], "title": NODES[dialect], "type": "http-request"}
    errors = result.raised["run"]
    assert len(errors) == (2 if "retries" in arguments else 1)
    for error in errors:
        assert isinstance(error, DifyWorkflowRunFailed)
        assert error.failed_node == node
        assert pickle.loads(pickle.dumps(error)).failed_node == node
    assert result.xcoms["run"]["workflow_run"]["failed_node"] == node


def test_where_no_event_names_it_there_is_none(dify: DifyStandIn) -> None:
    dify.starts.append(Start("run_streaming_failed", cut="workflow_started"))
    result = run_dag(OPERATOR.format(arguments={}))
    (error,) = result.raised["run"]
    assert isinstance(error, DifyWorkflowRunFailed)
    assert error.failed_node is None
    assert "failed_node" not in result.xcoms["run"]["workflow_run"]


def test_the_sensor_which_sees_no_events_names_none(dify: DifyStandIn) -> None:
    (error,) = run_sensor(workflow_run_id=dify.add_run("failed")).raised["wait"]
    assert isinstance(error, DifyWorkflowRunFailed)
    assert error.failed_node is None


def test_a_run_that_succeeds_although_a_node_failed_names_none(dify: DifyStandIn) -> None:
    failed = {
        "event": "node_finished",
        "data": {"node_id": "n", "title": "Item", "node_type": "llm", "status": "failed"},
    }
    dify.starts.append(Start(insert=(failed,)))
    result = run_dag(OPERATOR.format(arguments={}))
    assert result.state == "success"
    assert "failed_node" not in result.xcoms["run"]["workflow_run"]
