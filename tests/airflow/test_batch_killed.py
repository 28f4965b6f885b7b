"""A batch whose process is killed, on real Airflow processes: its retry pays for nothing twice."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_3_0, AirflowProcesses, airflow_processes
from tests.dify_stand_in import DifyStandIn, stall

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task whose process was killed"),
]

KEY = "app-zQ9-the-key-of-this-test"
ROWS = 24
ACTIVE = 4

DAG = """
import pendulum
import time
from datetime import timedelta
from pathlib import Path
from airflow.providers.common.compat.sdk import chain, dag
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

FLAG = Path({flag!r})

class SlowWriting(DifyRunWorkflowBatchOperator):
    # Writes half of the merged file, and waits there to be killed, once.
    def execute(self, context):
        from airflow_provider_dify.batch import result_files

        merge = result_files.merge_parts

        def slowly(parts):
            for number, line in enumerate(merge(parts)):
                yield line
                if number == {half} and FLAG.exists():
                    FLAG.unlink()
                    time.sleep(300)

        result_files.merge_parts = slowly
        return super().execute(context)

@dag(schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def killed():
    chain(*[
        (SlowWriting if name == "writing" else DifyRunWorkflowBatchOperator)(
            task_id=name,
            inputs=[{{"task": name, "n": n}} for n in range({rows})],
            output_path=None if name == "returned" else f"{folder}/{{name}}.jsonl",
            max_active_runs={active},
            not_found_grace=3,
            poll_interval=1,
            retries=1,
            retry_delay=timedelta(0),
        )
        for name in {names!r}
    ])

killed()
"""

NAMES = ["before", "middle", "writing", "returned"]


@pytest.fixture(scope="module")
def killed() -> Iterator[tuple[DifyStandIn, AirflowProcesses, Path]]:
    """Run the Dag, and kill each task's process once, at its moment."""
    with DifyStandIn("1.16.1") as dify, tempfile.TemporaryDirectory() as folder:
        dify.api_keys = {KEY}
        dify.run_duration = 0.5
        flag = Path(folder) / "flag"
        flag.touch()
        connection = {"conn_type": "dify", "host": dify.base_url, "password": KEY}
        environment = {
            "AIRFLOW_CONN_DIFY_DEFAULT": json.dumps(connection),
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
        }
        # The first starts arrive, and nothing comes of them.
        dify.misbehave(*[stall(300)] * ACTIVE, only="POST .*/run")
        moments: dict[str, Callable[[], bool]] = {
            "before": lambda: sum(request.method == "POST" for request in dify.requests) == ACTIVE,
            "middle": lambda: len(rows_started(dify, "middle")) >= ROWS // 2,
            "writing": lambda: not flag.exists(),
            "returned": lambda: len(rows_started(dify, "returned")) >= ROWS // 2,
        }
        with airflow_processes(environment) as airflow:
            (airflow.dags / "killed.py").write_text(
                DAG.format(flag=str(flag), half=ROWS // 2, folder=folder, rows=ROWS, active=ACTIVE, names=NAMES)
            )
            for name in NAMES:
                airflow.wait_for(moments[name], seconds=180)
                kill(airflow, name)
            airflow.wait_for(
                lambda: airflow.query("SELECT count(*) FROM dag_run WHERE state IN ('success', 'failed')") == [(1,)],
                seconds=240,
            )
            for path, content in airflow.everything_written():
                assert KEY.encode() not in content, path
            yield dify, airflow, Path(folder)


def rows_started(dify: DifyStandIn, name: str) -> list[int]:
    return [started.inputs["n"] for started in dify.started if started.inputs["task"] == name]


def kill(airflow: AirflowProcesses, name: str) -> None:
    def pids() -> list[tuple[int]]:
        return airflow.query(
            "SELECT pid FROM task_instance WHERE task_id = ? AND state = 'running' AND try_number = 1 AND pid > 0", name
        )

    airflow.wait_for(lambda: bool(pids()), seconds=30)
    with contextlib.suppress(ProcessLookupError):
        os.kill(pids()[0][0], signal.SIGKILL)


def results_of(airflow: AirflowProcesses, folder: Path, name: str) -> list[dict[str, Any]]:
    if name != "returned":
        return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    ((value,),) = airflow.query("SELECT value FROM xcom WHERE task_id = ? AND key = 'return_value'", name)
    results: list[dict[str, Any]] = json.loads(value)
    return results


@pytest.mark.parametrize("name", NAMES)
def test_the_retry_ends_with_each_rows_result_once_and_no_row_was_started_twice(
    killed: tuple[DifyStandIn, AirflowProcesses, Path], name: str
) -> None:
    dify, airflow, folder = killed
    assert airflow.query("SELECT state, try_number FROM task_instance WHERE task_id = ?", name) == [("success", 2)]
    assert sorted(rows_started(dify, name)) == list(range(ROWS))
    results = results_of(airflow, folder, name)
    assert [row["index"] for row in results] == list(range(ROWS))
    runs = {started.workflow_run_id: started.inputs for started in dify.started}
    assert [runs[row["workflow_run_id"]] for row in results] == [{"task": name, "n": n} for n in range(ROWS)]
    assert {row["status"] for row in results} == {"succeeded"}
    assert dify.stopped == []


def test_no_part_is_left(killed: tuple[DifyStandIn, AirflowProcesses, Path]) -> None:
    _, _, folder = killed
    assert sorted(path.name for path in folder.iterdir()) == ["before.jsonl", "middle.jsonl", "writing.jsonl"]


def test_each_user_names_one_row(killed: tuple[DifyStandIn, AirflowProcesses, Path]) -> None:
    dify, _, _ = killed
    assert set(Counter(started.user for started in dify.started).values()) == {1}
