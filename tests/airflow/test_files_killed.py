"""A batch of files whose process is killed twice: no run and no output twice, and no upload that nobody needed."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_3_0
from tests.airflow.shared_airflow import SharedAirflow
from tests.dify_stand_in.runs import Run

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.long,
    pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 does not retry a task whose process was killed"),
]

FILES = 200
ACTIVE = 8

DAG = """
import pendulum
from datetime import timedelta
from airflow.providers.common.compat.sdk import dag
from airflow_provider_dify.files import DifyFile
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

@dag({dag_id!r}, schedule="@once", start_date=pendulum.datetime(2026, 1, 1), catchup=False)
def killed():
    DifyRunWorkflowBatchOperator(
        task_id="run",
        dify_conn_id={conn_id!r},
        inputs=DifyFile.each({inbox!r}, field="report"),
        output_files={outbox!r},
        output_path={output_path!r},
        max_active_runs={active},
        not_found_grace=3,
        poll_interval=1,
        retries=2,
        retry_delay=timedelta(0),
    )

killed()
"""


def test_a_batch_of_files_is_killed_twice_and_pays_for_none_twice(shared: SharedAirflow, tmp_path: Path) -> None:
    inbox, outbox = tmp_path / "inbox", tmp_path / "outbox"
    inbox.mkdir()
    names = [f"{number:03}.txt" for number in range(FILES)]
    for name in names:
        (inbox / name).write_text(f"text of {name}")
    with shared.scenario("files_killed", dialect="1.16.1") as dag:
        dify = dag.dify
        dify.run_duration = 0.3

        def outputs_of(run: Run) -> dict[str, Any]:
            name, content = dify.uploads[run.inputs["report"]["upload_file_id"]]
            return {"file": dify.files.make(name, content.upper())}

        dify.outputs_of = outputs_of
        output_path = tmp_path / "results.jsonl"
        paths = {"inbox": str(inbox), "outbox": str(outbox), "output_path": str(output_path)}
        dag.add_dag(DAG, **paths, active=ACTIVE)
        for try_number in (1, 2):
            dag.wait_for(lambda: len(dify.started) >= 70 * try_number, seconds=240)  # noqa: B023
            condition = f"state = 'running' AND try_number = {try_number} AND pid > 0"
            ((pid,),) = dag.query("pid", "task_instance", condition)
            os.kill(pid, signal.SIGKILL)
        dag.wait_until_over(seconds=240)
        assert dag.query("state, try_number", "task_instance") == [("success", 3)]
        started = Counter(dify.uploads[run.inputs["report"]["upload_file_id"]][0] for run in dify.started)
        assert started == dict.fromkeys(names, 1)
        uploaded = Counter(name for name, _ in dify.uploads.values())
        assert set(uploaded.values()) <= {1, 2}
        assert len(dify.uploads) <= FILES + 2 * ACTIVE
    results = [json.loads(line) for line in output_path.read_text().splitlines()]
    assert [row["outputs"]["file"]["path"] for row in results] == [
        f"{outbox}/{n}/{name}" for n, name in enumerate(names)
    ]
    assert {str(path.relative_to(outbox)) for path in outbox.rglob("*.*")} == {f"{n}/{x}" for n, x in enumerate(names)}
    assert (outbox / "199" / "199.txt").read_text() == "TEXT OF 199.TXT"
