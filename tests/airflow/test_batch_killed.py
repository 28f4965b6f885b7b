"""A batch whose process is killed, on real Airflow processes: its retry pays for nothing twice."""

from __future__ import annotations

import functools
import json
import signal
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_3_0
from tests.airflow.shared_airflow import KEY, Scenario, SharedAirflow, chosen_params, side_by_side
from tests.combinations import each_or_long
from tests.dify_stand_in import DifyStandIn, stall

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task whose process was killed"),
]

ROWS = 24
ACTIVE = 4

DAG = """
import pendulum
import time
from datetime import timedelta
from pathlib import Path
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

FLAG = Path({flag!r})

class SlowWriting(DifyRunWorkflowBatchOperator):
    # Writes half of the merged file, and waits there to be killed, once.
    def execute(self, context):
        from airflow_provider_dify.batch import output

        merge = output.merge_parts

        def slowly(parts):
            for number, line in enumerate(merge(parts)):
                yield line
                if number == {half} and FLAG.exists():
                    FLAG.unlink()
                    time.sleep(300)

        output.merge_parts = slowly
        return super().execute(context)

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def killed():
    {operator}(
        task_id="run",
        dify_conn_id={conn_id!r},
        inputs=[{{"n": n}} for n in range({rows})],
        output_path={output_path!r},
        max_active_runs={active},
        not_found_grace=3,
        poll_interval=1,
        retries=1,
        retry_delay=timedelta(0),
    )

killed()
"""

NAMES = ["before", "middle", "writing", "returned"]


@dataclass
class Killed:
    """A Dag whose task was killed once, the Dify that it talked to, and the folder of its results."""

    dag: Scenario
    folder: Path

    @property
    def dify(self) -> DifyStandIn:
        return self.dag.dify

    @property
    def rows_started(self) -> list[int]:
        return [started.inputs["n"] for started in self.dify.started]

    @property
    def output(self) -> Path:
        return self.folder / "results.jsonl"

    def results(self) -> list[dict[str, Any]]:
        if self.output.exists():
            return [json.loads(line) for line in self.output.read_text().splitlines()]
        ((value,),) = self.dag.query("value", "xcom", "key = 'return_value'")
        results: list[dict[str, Any]] = json.loads(value)
        return results


@pytest.fixture(scope="module")
def killed(
    request: pytest.FixtureRequest, shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[Killed]]:
    """Run a Dag for each moment at the same time, and kill its task's process once, at that moment."""

    # pytest makes its own folder at the first of them, and not in two threads at once.
    folders = {name: tmp_path_factory.mktemp(name) for name in NAMES}

    def run(name: str) -> Killed:
        with shared.scenario(f"batch_killed_{name}", dialect="1.16.1") as dag:
            folder = folders[name]
            flag = folder / "flag"
            flag.touch()
            task = Killed(dag, folder)
            dag.dify.run_duration = 0.5
            if name == "before":
                # The first starts arrive, and nothing comes of them.
                dag.dify.misbehave(*[stall(300)] * ACTIVE, only="POST .*/run")
            moments: dict[str, Callable[[], bool]] = {
                "before": lambda: sum(request.method == "POST" for request in list(dag.dify.requests)) == ACTIVE,
                "middle": lambda: len(task.rows_started) >= ROWS // 2,
                "writing": lambda: not flag.exists(),
                "returned": lambda: len(task.rows_started) >= ROWS // 2,
            }
            dag.add_dag(
                DAG,
                operator="SlowWriting" if name == "writing" else "DifyRunWorkflowBatchOperator",
                flag=str(flag),
                half=ROWS // 2,
                output_path=None if name == "returned" else str(task.output),
                rows=ROWS,
                active=ACTIVE,
            )
            dag.wait_for(moments[name], seconds=240)
            dag.kill(signal.SIGKILL)
            dag.wait_until_over(seconds=240)
            return task

    return side_by_side({name: functools.partial(run, name) for name in chosen_params(request, "name")})


@pytest.mark.parametrize("name", each_or_long(NAMES, short=["middle"]))
def test_the_retry_ends_with_each_rows_result_once_and_no_row_was_started_twice(
    killed: dict[str, Future[Killed]], name: str
) -> None:
    task = killed[name].result()
    assert task.dag.query("state, try_number", "task_instance") == [("success", 2)]
    assert sorted(task.rows_started) == list(range(ROWS))
    results = task.results()
    assert [row["index"] for row in results] == list(range(ROWS))
    runs = {started.workflow_run_id: started.inputs["n"] for started in task.dify.started}
    assert [runs[row["workflow_run_id"]] for row in results] == list(range(ROWS))
    assert {row["status"] for row in results} == {"succeeded"}
    assert task.dify.stopped == []
    # Each user names one row, and no part is left.
    assert len({started.user for started in task.dify.started}) == ROWS
    files = {path.name for path in task.folder.iterdir()} - {"flag"}
    assert files == (set() if name == "returned" else {"results.jsonl"})
    for path, content in task.dag.airflow.everything_written():
        assert KEY.encode() not in content, path
