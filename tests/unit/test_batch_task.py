"""A batch as a task's try, over real HTTP: what becomes of its files when something is wrong with them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.batch import results
from airflow_provider_dify.batch.row_run import RowSettings
from airflow_provider_dify.batch.running import BatchSettings
from airflow_provider_dify.batch.task import BatchTask, TaskSettings
from airflow_provider_dify.exceptions import DifyError
from tests.dify_stand_in import DifyStandIn

pytestmark = pytest.mark.usefixtures("dify_connection")

ROWS = 40
ROW = RowSettings(
    workflow_id=None,
    run_retries=0,
    fail_on_partial_success=False,
    timeout=60.0,
    run_timeout=None,
    poll_interval=0.05,
    not_found_grace=0.2,
    max_consecutive_failures=5,
)


def run_try(
    output: Path | None, *, rows: Any = ROWS, try_number: int = 1, at_end: Callable[[], object] = lambda: None
) -> Any:
    """Run a try of a task with one retry; when its runs are over, and before their results are merged, do something."""
    inputs = [{"n": n} for n in range(rows)] if isinstance(rows, int) else rows
    ti = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, try_number=try_number, max_tries=1)
    summaries: list[dict[str, Any]] = []

    def push(summary: dict[str, Any]) -> None:
        summaries.append(summary)
        if len(summaries) == 2:
            at_end()

    batch = BatchSettings(inputs, "dify_default", 4, 30.0, ROW)
    settings = TaskSettings(None, None if output is None else str(output), 0, 1)
    task = BatchTask(batch, settings, {"ti": ti}, logging.getLogger("batch"), push)  # type: ignore[typeddict-item]
    return task.run(lambda app_id: None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts_with_rows(output: Path) -> list[Path]:
    return sorted(path for path in Path(f"{output}.parts").glob("*/*-*") if '"index"' in path.read_text())


def cut(part: Path) -> None:
    os.truncate(part, part.stat().st_size // 2)


@pytest.mark.parametrize("which", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("damage", [Path.unlink, cut], ids=["removed", "cut"])
def test_a_part_that_is_gone_fails_the_try_and_the_retry_reads_its_rows_from_the_log(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], which: int
) -> None:
    # Many parts: a later one says that what came before is written.
    monkeypatch.setattr(results, "PART_SECONDS", 0.0)
    dify.run_duration = 0.1
    output = tmp_path / "results.jsonl"
    with pytest.raises(DifyError, match="results are missing") as failure:
        run_try(output, at_end=lambda: damage(parts_with_rows(output)[which]))
    # A retry is worth it.
    assert type(failure.value) is DifyError
    left = len(lines_of(output))
    assert 0 < left < ROWS
    assert f"{ROWS - left} of {ROWS} results are missing" in str(failure.value)
    run_try(output, try_number=2)
    assert [row["index"] for row in lines_of(output)] == list(range(ROWS))
    assert {row["status"] for row in lines_of(output)} == {"succeeded"}
    # Nothing was paid twice.
    assert sorted(started.inputs["n"] for started in dify.started) == list(range(ROWS))
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
