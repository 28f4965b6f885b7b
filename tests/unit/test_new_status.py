"""A status that Dify adds: a good end is a line or two in ``api/models.py``, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import airflow_provider_dify

PACKAGE = Path(airflow_provider_dify.__file__).parent
PROGRAM = """
import time

from airflow_provider_dify.api.models import LoggedWorkflowRun, WorkflowRun, WorkflowRunStatus
from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.batch.resuming import FoundRun, plan_row
from airflow_provider_dify.runs.log import RunSearch
from airflow_provider_dify.runs.waiting import WaitArguments
from airflow_provider_dify.runs.wanted import RunFilter

status = WorkflowRunStatus("finished-early")
run = WorkflowRun("run-1", None, status, {}, {}, None, 2, 42, None, None, 1.5)
print(run.is_over, WaitArguments(fail_on_partial_success=True).judge(run).outcome.value)

progress = BatchProgress(1, 0, began_at=0)
print(progress.add(RowResult.of_run(0, run)), progress.summary(0)["finished_early"], progress.has_failed)
print(plan_row([FoundRun(0, "run-1", status)], run_retries=3).workflow_run_id)

row = LoggedWorkflowRun("run-1", status, "me", None, 2, 42, None, None, 1.5)
print(RunSearch("me", time.time(), True, skips_failed=True).is_candidate(row))
print(RunFilter.parse(statuses="finished-early", triggered_from=None, user=None).fits(row))
"""


def test_a_new_good_end_succeeds_in_a_task_and_a_batch_once_the_models_name_it(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    models = tmp_path / PACKAGE.name / "api" / "models.py"
    source = models.read_text()
    named = source.replace('    FAILED = "failed"\n', '    EARLY = "finished-early"\n    FAILED = "failed"\n')
    named = named.replace("GOOD_STATUSES = frozenset({", "GOOD_STATUSES = frozenset({WorkflowRunStatus.EARLY, ")
    assert named.count("EARLY") == source.count("EARLY") + 2
    models.write_text(named)

    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "AIRFLOW_HOME": str(tmp_path / "airflow")}
    command = [sys.executable, "-c", PROGRAM]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.stdout.splitlines()[-5:] == ["True done", "False 1 False", "run-1", "True", "True"], said.stderr
