"""The places of a batch's runs at once: who gets one, in row order, and who has to give it back. For an event loop."""

from __future__ import annotations

import asyncio
import heapq
import time
from typing import TYPE_CHECKING

from airflow_provider_dify.batch.concurrency import RunLimit
from airflow_provider_dify.exceptions import DifyConnectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk.types import Logger


class Places:
    """
    The places of a batch's runs at once.

    :param limit: how many there are.
    :param log: the task's log.
    :param on_change: called when a place may have become free.
    """

    def __init__(self, limit: RunLimit, log: Logger, on_change: Callable[[], None]) -> None:
        self._holders: set[int] = set()
        self._limit = limit
        self._log = log
        self._on_change = on_change
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def taken(self) -> int:
        """Places that are in use."""
        return len(self._holders)

    def holds(self, row: int) -> bool:
        """Return whether a row has a place."""
        return row in self._holders

    @property
    def waiting(self) -> int:
        """Rows that wait for a place."""
        return len(self._waiting)

    def may_take(self) -> bool:
        """Return whether there is a place."""
        return self._limit.may_start(self.taken, time.monotonic())

    def seconds_until_change(self) -> float | None:
        """Return when there may be a place although no run ends; ``None`` for never."""
        return self._limit.seconds_until_change(self.taken, time.monotonic())

    def take(self, row: int) -> None:
        """Take a place that :meth:`may_take` saw."""
        self._holders.add(row)

    def give_back(self, row: int) -> None:
        """Give a row's place back, if it has one."""
        self._holders.discard(row)
        self._on_change()

    async def wait(self, row: int) -> None:
        """Wait for a place; the first row gets the first one."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (row, place))
        self._on_change()
        await place

    def grant(self) -> bool:
        """Let the first row that waits have a place, if there is one; return whether it got one."""
        while self._waiting and self._waiting[0][1].done():
            # It was cancelled meanwhile.
            heapq.heappop(self._waiting)
        if not self._waiting or not self.may_take():
            return False
        row, place = heapq.heappop(self._waiting)
        self.take(row)
        place.set_result(None)
        return True

    async def after_refusal(self, row: int, sent_at: float, error: DifyConnectionError) -> None:
        """
        Give a place back, because Dify turned its start away, and wait for another one.

        :param row: the row.
        :param sent_at: when the start was sent, by ``time.monotonic``.
        :param error: what Dify responded.
        """
        if self._limit.on_refused(sent_at, time.monotonic(), error.retry_after):
            self._log.info("Dify has too many active runs; at most %d at once from now on.", self._limit.limit)
        self.give_back(row)
        await self.wait(row)

    def on_started(self) -> None:
        """Take note that Dify took a start."""
        self._limit.on_started()
