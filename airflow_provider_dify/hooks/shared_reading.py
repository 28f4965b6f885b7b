# SPDX-License-Identifier: Apache-2.0
"""
One reading of an app's log for all who watch it in a process.

Airflow 3.3 can share a stream between event triggers, which does not fit here: a stream is opened without the asset's
state, so it can't go on where it stopped, and who joins late misses what was read before. So each watcher keeps its own
window, and what several of them ask at the same moment is asked once.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any, TypeVar

from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.client import Shared
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook

T = TypeVar("T")

# Seconds for which a response is shared; far below the time between two looks.
SHARED_SECONDS = 1.0
# Seconds after which the connection is read again: a watcher never ends, and a connection may be given another host.
CONNECTION_SECONDS = 600.0


class SharedReading(Shared):
    """What reads one app's log for all who watch it, one request after another. It is opened at the first request."""

    def __init__(self, dify_conn_id: str) -> None:
        self.dify_conn_id = dify_conn_id
        self._hook: DifyAsyncHook | None = None
        self._opened_at = 0.0
        self._lock = asyncio.Lock()
        self._responses: dict[tuple[Any, ...], tuple[float, asyncio.Task[Any]]] = {}

    async def perform(self, call: Call[T]) -> T:
        """Send a request, unless another watcher has sent it at this moment, and return what its response means."""
        now = time.monotonic()
        self._responses = {
            key: (at, task)
            for key, (at, task) in self._responses.items()
            if not task.done() or (now - at < SHARED_SECONDS and not task.cancelled() and task.exception() is None)
        }
        key = (call.method, call.path, *sorted((call.params or {}).items()))
        if key not in self._responses:
            self._responses[key] = now, asyncio.create_task(self._send(call))
        # Shielded, because a watcher that ends must not end what others wait for.
        result: T = await asyncio.shield(self._responses[key][1])
        return result

    async def _send(self, call: Call[T]) -> T:
        async with self._lock:
            if self._hook is None or time.monotonic() - self._opened_at > CONNECTION_SECONDS:
                await self._hang_up()
                self._hook = await DifyAsyncHook(self.dify_conn_id).__aenter__()
                self._opened_at = time.monotonic()
            try:
                return await self._hook.perform(call)
            except DifyConnectionError:
                # Dify may have moved.
                self._opened_at = -math.inf
                raise

    async def _close(self) -> None:
        tasks = [task for _, task in self._responses.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._hang_up()

    async def _hang_up(self) -> None:
        hook, self._hook = self._hook, None
        if hook is not None:
            await hook.close()
