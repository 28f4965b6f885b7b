"""How a killed trigger's last work comes to its end, although Airflow goes on cancelling it."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Coroutine

# An event loop keeps only weak references to its tasks.
_tasks: set[asyncio.Task[None]] = set()


async def run_shielded(work: Coroutine[Any, Any, None], timeout: float) -> None:
    """
    Run to its end what a trigger does in ``on_kill``.

    Airflow 3.3 cancels a killed trigger again about every second, until it has ended. That ends an ``on_kill`` that
    takes longer, without a word. Before Python 3.12 the second cancel also ends Airflow's own wait for ``on_kill``;
    the work goes on then, too.

    :param work: what to do.
    :param timeout: seconds that it may take.
    :raises asyncio.TimeoutError: if it takes longer.
    """
    task = asyncio.create_task(asyncio.wait_for(work, timeout))
    _tasks.add(task)
    task.add_done_callback(_tasks.discard)
    while not task.done():
        # The caller is cancelled; or the loop comes to its end, which has cancelled the task, too.
        with suppress(asyncio.CancelledError):
            await asyncio.shield(task)
    task.result()
