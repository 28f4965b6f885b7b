"""What a killed trigger does last: whether its task waits elsewhere, and how the work comes to its end."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from airflow.sdk.types import Logger


# An event loop keeps only weak references to its tasks.
_tasks: set[asyncio.Task[None]] = set()


async def run_shielded(work: Coroutine[Any, Any, None], timeout: float) -> None:
    """
    Run to its end what a trigger does in ``on_kill``; raises an asyncio.TimeoutError after ``timeout`` seconds. Airflow
    3.3 cancels a killed trigger again about every second, which ends a longer ``on_kill`` without a word. Before Python
    3.12 the second cancel also ends Airflow's own wait for ``on_kill``; the work goes on then, too.
    """
    task = asyncio.create_task(asyncio.wait_for(work, timeout))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    while not task.done():
        # The caller is cancelled; or the loop comes to its end, which has cancelled the task, too.
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()


async def is_waiting_elsewhere(ti: Any, log: Logger) -> bool:
    """
    Return whether a task still waits, on another triggerer; ``False`` where Airflow doesn't say. Airflow 3.3 calls a
    trigger's ``on_kill`` also on a triggerer that was silent for so long (a minute under load, say) that another one
    has taken its triggers over.
    """
    if ti is None:
        return False
    from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance
    from asgiref.sync import sync_to_async

    task = {"dag_id": ti.dag_id, "task_ids": [ti.task_id], "run_ids": [ti.run_id], "map_index": ti.map_index}
    try:
        states = await sync_to_async(RuntimeTaskInstance.get_task_states)(**task)
    except Exception:
        log.warning("Airflow did not say whether the task still waits; its run is stopped.", exc_info=True)
        return False
    return "deferred" in states.get(ti.run_id, {}).values()
