"""How long this machine stood still while a test measured time."""

from __future__ import annotations

import threading
import time
from types import TracebackType

# Seconds between two looks at the clock, and from how many seconds too late a look counts.
INTERVAL, LATE = 0.02, 0.1


class Standstill:
    """
    Counts the seconds in which nothing ran here at all, as on a machine whose CPUs are taken away.

    What is tested cannot be blamed for them. A call that blocks its thread lets this one run, so it does not count.

    :ivar seconds: of standstill so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Standstill:
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._end.wait(INTERVAL):
            now = time.monotonic()
            late = now - before - INTERVAL
            if late > LATE:
                self.seconds += late
            before = now
