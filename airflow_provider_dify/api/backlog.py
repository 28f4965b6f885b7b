"""How many events a stream may be ahead of its reader: beyond that, no more bytes are taken from its server."""

from __future__ import annotations

from collections import deque

MAX_EVENTS = 1_000
MAX_BYTES = 16 * 1024 * 1024


class Backlog:
    """The events of a stream that its reader has not taken yet, as the one who reads the socket knows them."""

    def __init__(self) -> None:
        # Of each event, or of the first one of several that came together.
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._begun = 0

    def add(self, size: int, events: int) -> None:
        """
        Note the next piece of the stream.

        :param size: its bytes.
        :param events: how many events it completed.
        """
        self._begun += size
        if events:
            self._sizes.extend([self._begun, *[0] * (events - 1)])
            self._bytes += self._begun
            self._begun = 0

    def is_full(self, waiting: int) -> bool:
        """
        Return whether the reader has to catch up first.

        :param waiting: how many events it has not taken yet.
        """
        while len(self._sizes) > waiting:
            self._bytes -= self._sizes.popleft()
        return waiting >= MAX_EVENTS or self._bytes >= MAX_BYTES
