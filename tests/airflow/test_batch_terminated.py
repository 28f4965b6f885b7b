"""A batch that Airflow terminates, on real Airflow processes: its runs are stopped, and the retry goes on."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from tests.airflow.airflow_processes import AIRFLOW_2, airflow_processes
from tests.dify_stand_in import API_KEY, DifyStandIn, Start

pytestmark = [
    pytest.mark.airflow_processes,
    # Airflow 2's task process has a parent that answers a signal for it.
    pytest.mark.skipif(AIRFLOW_2 or not CAN_START_FROM_TRIGGER, reason="this Airflow does not retry such a task"),
]

DAG = """
import pendulum
from datetime import timedelta
from airflow.sdk import dag
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

@dag(schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def terminated():
    DifyRunWorkflowBatchOperator(
        task_id="run", inputs=[{{"n": n}} for n in range(10)], output_path={output!r}, max_active_runs=4,
        poll_interval=1, not_found_grace=2, retries=1, retry_delay=timedelta(seconds=1),
    )

terminated()
"""
FIRST_TRY = "SELECT pid FROM task_instance WHERE state = 'running' AND try_number = 1 AND pid IS NOT NULL"
ENDED = "SELECT count(*) FROM dag_run WHERE state IN ('success', 'failed')"


# The record of a run that was stopped stays `running` for ever on 1.14.2: nobody may wait for it.
@pytest.mark.parametrize("version", ["1.14.2", "1.16.1"])
def test_a_terminated_batch_stops_its_runs_and_the_retry_runs_the_rows_again(version: str, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    with DifyStandIn(version) as dify:
        # Two rows are over before.
        dify.starts += [Start(), Start(), *(Start(duration=300) for _ in range(4))]
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
        with airflow_processes({"AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection)}) as airflow:
            (airflow.dags / "terminated.py").write_text(DAG.format(output=str(output)))
            airflow.wait_for(lambda: len(dify.started) == 6, seconds=120)
            time.sleep(1)
            os.kill(airflow.query(FIRST_TRY)[0][0], signal.SIGTERM)
            sent = time.monotonic()
            airflow.wait_for(lambda: len(dify.stopped) == 4, seconds=10)
            assert time.monotonic() - sent < 5
            airflow.wait_for(lambda: airflow.query(ENDED) == [(1,)], seconds=120)
            assert airflow.query("SELECT state, try_number FROM task_instance") == [("success", 2)]
        assert sorted(task_id for task_id, _ in dify.stopped) == sorted(run.task_id for run in dify.started[2:6])
        rows = [run.inputs["n"] for run in dify.started]
    stopped = {run.inputs["n"] for run in dify.started[2:6]}
    assert {n: rows.count(n) for n in range(10)} == {n: 2 if n in stopped else 1 for n in range(10)}
    results = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["index"], row["status"]) for row in results] == [(n, "succeeded") for n in range(10)]
