"""Which tasks of the soak start runs, and how. Dag and test read the same list."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

CONN_ID = "dify_soak"
DAG_ID = "soak"
STARTS = 200

# Half of the tasks share a user: their inputs distinguish their runs.
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"deferrable": True, "defer_after": 0},
    {"user": "soak"},
    {"user": "soak", "deferrable": True},
)
ARGUMENTS: dict[str, Any] = {
    "dify_conn_id": CONN_ID,
    "poll_interval": 2,
    "timeout": 180,
    "retries": 3,
    "retry_delay": timedelta(seconds=2),
}


def task_id_of(number: int) -> str:
    """Name a task."""
    return f"start-{number}"


def inputs_of(number: int) -> dict[str, str]:
    """Return a task's inputs, which the stand-in for Dify returns as the run's outputs."""
    return {"number": str(number), "text": f"of task {number}"}
