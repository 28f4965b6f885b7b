# SPDX-License-Identifier: Apache-2.0
"""How many runs a batch has at once, and which row has a place among them."""

from __future__ import annotations

import asyncio
import heapq
import time
from typing import TYPE_CHECKING

from airflow_provider_dify.exceptions import DifyConnectionError

if TYPE_CHECKING:
    from collections.abc import Callable

    from airflow.sdk.types import Logger


# Seconds without a refusal after which there may be one run more at once.
GROWTH_INTERVAL = 10.0
# Seconds without a start after the first refusal, doubled with each further one in a row.
FIRST_PAUSE = 1.0
MAX_PAUSE = 60.0


class RunLimit:
    """
    The number of runs at once: halved when Dify says that there are too many, grown again by one at a time. Times are
    seconds of any clock that doesn't go back. A row keeps its place until it is over, through its retries and the
    pauses between them.
    """

    def __init__(self, max_active_runs: int) -> None:
        self.limit = max_active_runs
        self._most = max_active_runs
        self._refusals = 0
        self._last_change = float("-inf")
        self._paused_until = float("-inf")

    def may_start(self, active: int, now: float) -> bool:
        """Return whether a start may be sent now; ``active`` counts the starts that have no response yet, too."""
        if now < self._paused_until:
            return False
        # Only when the present number is in use, so that one run more tells something.
        if active == self.limit < self._most and now - self._last_change >= GROWTH_INTERVAL:
            self.limit += 1
            self._last_change = now
        return active < self.limit

    def seconds_until_change(self, active: int, now: float) -> float | None:
        """Return when to ask :meth:`may_start` again, 0 for at once; ``None`` if nothing changes until a run ends."""
        if now < self._paused_until:
            return self._paused_until - now
        if active == self.limit < self._most:
            return max(0.0, self._last_change + GROWTH_INTERVAL - now)
        return None if active >= self.limit else 0.0

    def on_refused(self, sent_at: float, now: float, retry_after: float | None = None) -> bool:
        """
        Take note that Dify turned a start away because it has too many; return whether the number was halved. Starts
        that were under way when it was halved say nothing about the new one. ``retry_after`` is seconds.
        """
        is_new = sent_at >= self._last_change
        if is_new:
            self._refusals += 1
            self._last_change = now
            self.limit = max(1, self.limit // 2)
        pause = min(FIRST_PAUSE * 2.0 ** (min(self._refusals, 16) - 1), MAX_PAUSE)
        self._paused_until = max(self._paused_until, now + (pause if is_new else 0.0), now + (retry_after or 0.0))
        return is_new

    def on_started(self) -> None:
        """Take note that Dify took a start."""
        self._refusals = 0


class Places:
    """The places of a batch's runs at once; ``on_change`` is called when one may have become free."""

    def __init__(self, limit: RunLimit, log: Logger, on_change: Callable[[], None]) -> None:
        self._holders: set[int] = set()
        self.limit = limit
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
        return self.limit.may_start(self.taken, time.monotonic())

    def seconds_until_change(self) -> float | None:
        """Return when there may be a place although no run ends; ``None`` for never."""
        return self.limit.seconds_until_change(self.taken, time.monotonic())

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
        """Give a place back, as Dify refused its start of ``sent_at`` (``time.monotonic``), and wait for another."""
        if self.limit.on_refused(sent_at, time.monotonic(), error.retry_after):
            self._log.info("Dify has too many active runs; at most %d at once from now on.", self.limit.limit)
        self.give_back(row)
        await self.wait(row)
