"""A task's own callbacks after tries that failed, on real Airflow processes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.airflow.shared_airflow import SharedAirflow
from tests.dify_stand_in import Start

pytestmark = [pytest.mark.airflow_processes, pytest.mark.long]

DAG = """
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator

def note(what):
    def callback(context):
        with open({called!r}, "a") as file:
            file.write(f"{{what}} {{type(context.get('exception')).__name__}}\\n")
    return callback

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def callbacks():
    DifyRunWorkflowOperator(
        task_id="run", dify_conn_id={conn_id!r}, inputs={{}}, poll_interval=1, retries=1,
        retry_delay=timedelta(seconds=1), on_retry_callback=note("retry"), on_failure_callback=note("failure"),
    )

callbacks()
"""


def test_the_callbacks_of_a_retry_and_of_a_failure_are_called(shared: SharedAirflow, tmp_path: Path) -> None:
    called = tmp_path / "called.txt"
    with shared.scenario("callbacks") as scenario:
        scenario.dify.starts.extend([Start(statuses=("failed",)), Start(statuses=("failed",))])
        scenario.add_dag(DAG, called=str(called))
        scenario.wait_until_over(seconds=180)
        # Airflow calls them after it has written the task's state.
        scenario.wait_for(lambda: called.exists() and len(called.read_text().splitlines()) == 2, seconds=30)
        assert called.read_text().splitlines() == ["retry DifyWorkflowRunFailed", "failure DifyWorkflowRunFailed"]
        logs = shared.airflow.home / "logs" / "dag_id=callbacks"
        written = "".join(path.read_text() for path in logs.rglob("*.log"))
        assert "DifyWorkflowRunFailed" in written
        # Airflow 3.0 to 3.2 refuse rendered fields of a try that will be retried, and 3.0 and 3.1 end its process then.
        assert "Top level error" not in written
        assert "Failed to set rendered fields" not in written
