"""Things that all who use an event loop share, and that the last one who leaves closes."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Hashable
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from typing_extensions import Self


class Shared:
    """
    Mixed into what is shared: made by the first who joins with a key, closed when the last one leaves.

    Joining and leaving count without an ``await`` in between, so that no cancellation can fall between the count and
    what it stands for.
    """

    users: int = 0
    # What there is of each class, by event loop and key.
    on_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, Any]]]

    def __init_subclass__(cls) -> None:
        cls.on_loops = WeakKeyDictionary()

    @classmethod
    def join(cls, key: Hashable) -> Self:
        """Return what this event loop shares for a key, and count one more who uses it."""
        existing = cls.on_loops.setdefault(asyncio.get_running_loop(), {})
        shared: Self = existing.setdefault(key, cls(key))  # type: ignore[call-arg]  # of the class that this is mixed into
        shared.users += 1
        return shared

    async def leave(self) -> None:
        """Count one less, and close it after the last one."""
        self.users -= 1
        if self.users:
            return
        existing = self.on_loops.get(asyncio.get_running_loop(), {})
        # Out of reach before the first await: who comes now makes one of its own.
        for key in [key for key, shared in existing.items() if shared is self]:
            del existing[key]
        # Shielded, because a cancelled trigger must not leave its sockets behind.
        await asyncio.shield(self._close())

    def _close(self) -> Awaitable[Any]:
        raise NotImplementedError
