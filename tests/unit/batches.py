"""Tries of batches, for the tests of them: their tasks, settings, rows and results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from airflow_provider_dify.batch.row import BatchSettings
from airflow_provider_dify.batch.running import BatchTask
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import WaitArguments

WAIT = WaitArguments(poll_interval=0.05, not_found_grace=0.2)


def ti_of(**fields: Any) -> Any:
    """Return what a batch reads of a task instance: by default, the first of two tries."""
    known = {"dag_id": "dag", "task_id": "task", "map_index": -1, "run_id": "run", "try_number": 1, "max_tries": 1}
    return SimpleNamespace(**{**known, **fields})


def settings_for(
    inputs: Any,
    output_path: object = None,
    *,
    not_found_grace: float = WAIT.not_found_grace,
    max_consecutive_failures: int = 5,
    **changes: Any,
) -> BatchSettings:
    """Return the settings of a batch with four runs at once and one retry."""
    wait = replace(WAIT, not_found_grace=not_found_grace, max_consecutive_failures=max_consecutive_failures)
    path = None if output_path is None else str(output_path)
    settings = BatchSettings(inputs, wait, max_active_runs=4, timeout=60.0, retries=1, output_path=path)
    return replace(settings, **changes)


def task_of(
    settings: BatchSettings, push: Callable[[dict[str, Any]], None] = lambda summary: None, **ti: Any
) -> BatchTask:
    """Return a try of a batch, of the task instance with these fields."""
    context: Any = {"ti": ti_of(**ti)}
    log: Any = logging.getLogger("batch")
    return BatchTask(settings, context, DifyHook(), log, push)


def numbered(count: int) -> list[dict[str, Any]]:
    """Return rows that tell their number."""
    return [{"n": n} for n in range(count)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the results in a file."""
    return [json.loads(line) for line in path.read_text().splitlines()]
