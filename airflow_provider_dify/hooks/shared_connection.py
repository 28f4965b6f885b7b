"""
One reading of a connection for all triggers of a process.

A trigger reads its connection over the triggerer's parent process and Airflow's API. When a triggerer starts again with
a thousand waits, a thousand readings would stand in line before the first poll of each.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from airflow.providers.common.compat.connection import get_async_connection

from airflow_provider_dify.api.connection import DifyConnection

# Seconds for which a reading counts.
FRESH_SECONDS = 60.0


@dataclass(frozen=True)
class _Reading:
    task: asyncio.Task[DifyConnection]
    began: float

    @property
    def is_fresh(self) -> bool:
        """Whether it is under way, or has brought something not long ago."""
        if not self.task.done():
            return True
        failed = self.task.cancelled() or self.task.exception() is not None
        return not failed and time.monotonic() - self.began < FRESH_SECONDS


async def read_connection(conn_id: str, *, refused: DifyConnection | None = None) -> DifyConnection:
    """
    Return a connection's settings, which are read once a minute at most for all who use this event loop.

    :param conn_id: the Airflow connection.
    :param refused: the settings whose key Dify has just refused: what was read before now and is the same doesn't
        count.
    :raises DifyConfigurationError: if the connection cannot be used.
    """
    readings = _readings.setdefault(asyncio.get_running_loop(), {})
    now = time.monotonic()
    while True:
        reading = readings.get(conn_id)
        if reading is None or not reading.is_fresh:
            reading = readings[conn_id] = _begin(conn_id)
        # Shielded, because a trigger that is cancelled must not end what others wait for.
        connection = await asyncio.shield(reading.task)
        if connection != refused or reading.began >= now:
            return connection
        if readings.get(conn_id) is reading:
            # The first of many whose key was refused; the others wait for the same new reading.
            readings[conn_id] = _begin(conn_id)


def _begin(conn_id: str) -> _Reading:
    task = asyncio.create_task(_read(conn_id))
    task.add_done_callback(_retrieve)
    return _Reading(task, time.monotonic())


async def _read(conn_id: str) -> DifyConnection:
    return DifyConnection.from_airflow(await get_async_connection(conn_id))


def _retrieve(task: asyncio.Task[DifyConnection]) -> None:
    """Take note of an error that nobody waits for any more, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


_readings: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Reading]] = WeakKeyDictionary()
