"""A batch of many rows takes no more memory than one of a few: rows, runs and results pass through it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.dify_stand_in import DifyStandIn

pytestmark = pytest.mark.long

MANY = int(os.environ.get("BATCH_ROWS", "10000"))

BATCH = """
import logging, resource, sys
from types import SimpleNamespace
from airflow_provider_dify.batch.row import BatchSettings
from airflow_provider_dify.batch.running import BatchTask
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import WaitArguments

rows, output = sys.argv[1:]
ti = SimpleNamespace(dag_id="d", task_id="t", run_id=output, map_index=-1, try_number=1, max_tries=0)
settings = BatchSettings(rows, WaitArguments(not_found_grace=60.0), 50, timeout=3600.0, output_path=output)
task = BatchTask(settings, {"ti": ti}, DifyHook(), logging.getLogger("batch"), lambda summary: None)
task.run(lambda app_id: None)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def megabytes_for(count: int, folder: Path, dify: DifyStandIn) -> float:
    """Run a batch of so many rows in a process of its own, check its results, and return the most memory it had."""
    rows, output = folder / f"{count}.jsonl", folder / f"{count}-results.jsonl"
    with rows.open("w") as file:
        file.writelines(json.dumps({"n": n, "text": "x" * 500}) + "\n" for n in range(count))
    done = subprocess.run(
        [sys.executable, "-c", BATCH, str(rows), str(output)], capture_output=True, text=True, check=True
    )
    with output.open() as results:
        assert all(json.loads(line)["index"] == n for n, line in enumerate(results))
    assert sum(1 for _ in output.open()) == count
    return int(done.stdout.split()[-1]) / 1024


def test_many_rows_take_the_memory_of_a_few(dify: DifyStandIn, dify_connection: str, tmp_path: Path) -> None:
    dify.run_duration = 0.0
    few = megabytes_for(1_000, tmp_path, dify)
    began = time.monotonic()
    many = megabytes_for(MANY, tmp_path, dify)
    seconds = time.monotonic() - began
    print(f"\n1,000 rows: {few:.0f} MB; {MANY:,} rows: {many:.0f} MB, in {seconds:.0f} s")
    assert len(dify.started) == 1_000 + MANY
    assert many - few < 50
