"""What a thread hands to a task's main thread, which a signal may interrupt while it waits."""

from __future__ import annotations

import contextlib
import threading
import time
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

T = TypeVar("T")


class Mailbox(Generic[T]):
    """
    A queue whose wait ends in time also where a signal's handler takes longer, and waits on the same queue.

    ``SimpleQueue.get`` never ends then on Python 3.10 to 3.12 (measured): it goes on with what is left of its timeout,
    which is negative. ``Queue.get`` holds a lock, for which a handler in the same thread would wait for ever.
    """

    def __init__(self) -> None:
        self._items: SimpleQueue[T] = SimpleQueue()
        # Free once something has arrived since the last wait.
        self._arrival = threading.Lock()
        self._arrival.acquire()

    @property
    def waiting(self) -> int:
        """How many items nobody has taken yet."""
        return self._items.qsize()

    def put(self, item: T) -> None:
        """Hand over an item, from any thread."""
        self._items.put(item)
        # Free already where nobody has waited since the last one.
        with contextlib.suppress(RuntimeError):
            self._arrival.release()

    def get(self, timeout: float) -> T:
        """
        Return the next item.

        :param timeout: seconds to wait for it.
        :raises Empty: if none came in time.
        """
        until = time.monotonic() + timeout
        while True:
            with contextlib.suppress(Empty):
                return self._items.get_nowait()
            left = until - time.monotonic()
            if left <= 0 or not self._arrival.acquire(timeout=left):
                # What came meanwhile, and a handler has taken note of.
                return self._items.get_nowait()
