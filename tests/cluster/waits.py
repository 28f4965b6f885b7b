"""Which runs are waited for, in which way, and how each ends. Dags and tests read the same list."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

CONN_ID = "dify_default"
DAG_ID = "waits_while_processes_die"
# A killed worker costs its tasks a try.
RETRIES = 2

ENDED_BY_TRIGGERER = {"end_from_trigger": True}
ALL_ON_TRIGGERER = {"start_from_trigger": True, "end_from_trigger": True}

# How many waits, in which way: 300 sensors, and 50 operators, which start a run of their own.
SENSORS: dict[str, tuple[int, dict[str, Any]]] = {
    "deferrable": (100, {"deferrable": True}),
    "ended_by_triggerer": (100, ENDED_BY_TRIGGERER),
    "all_on_triggerer": (100, ALL_ON_TRIGGERER),
}
OPERATORS: dict[str, tuple[int, dict[str, Any]]] = {
    "run_on_worker": (10, {}),
    "run_deferrable": (15, {"deferrable": True, "defer_after": 0}),
    "run_ended_by_triggerer": (25, {**ENDED_BY_TRIGGERER, "defer_after": 0}),
}

# How many runs in twenty end how, and what becomes of the task.
ENDINGS = ["succeeded"] * 15 + ["partial-succeeded"] * 2 + ["failed"] * 2 + ["stopped"]
STATE_OF_TASK = {"succeeded": "success", "partial-succeeded": "success", "failed": "failed", "stopped": "failed"}

# The ways whose cost is counted, all with sensors.
COUNTED: dict[str, dict[str, Any]] = {
    "poke": {"mode": "poke"},
    "reschedule": {"mode": "reschedule"},
    "deferrable": {"deferrable": True},
    "ended_by_triggerer": ENDED_BY_TRIGGERER,
    "all_on_triggerer": ALL_ON_TRIGGERER,
}
COUNTED_INTERVAL = 10


@dataclass(frozen=True)
class Wait:
    """
    A task that waits for a run.

    :param task_id: the task.
    :param arguments: those that say in which way it waits.
    :param ending: the status that its run ends with.
    :param outputs: what the run gives.
    """

    task_id: str
    arguments: dict[str, Any]
    ending: str
    outputs: dict[str, Any]


def waits(ways: dict[str, tuple[int, dict[str, Any]]]) -> list[Wait]:
    """List the waits of some ways; the first of each way succeeds with an output of a megabyte."""
    return [
        Wait(task_id := f"{way}-{number}", arguments, ENDINGS[number % len(ENDINGS)], outputs_of(task_id, number == 0))
        for way, (count, arguments) in ways.items()
        for number in range(count)
    ]


def workflow_run_id(task_id: str) -> str:
    """Name the run that a sensor waits for."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, task_id))


def outputs_of(task_id: str, is_big: bool) -> dict[str, Any]:
    """Make outputs with text of many scripts and nested values."""
    outputs = {
        "answer": f'héllo 你好 🎉 \u202eעברית "quoted" \\ \t\n{task_id}',
        "nested": {"items": [1, -2.5, "二", None, True, {"a": [[], {}, ""]}], "ключ": {"z": 1, "aa": 2, "b": 3}},
        "empty": {},
    }
    return {**outputs, "text": "Größe 大 🎉 " * 62_000} if is_big else outputs
