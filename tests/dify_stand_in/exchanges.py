"""The last requests to the stand-ins of this process, for the report of a test that fails."""

from __future__ import annotations

import json
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aiohttp import web

KEPT = 60


@dataclass
class Exchange:
    """A request to the stand-in on this port, and what is known of it and of its response so far."""

    port: int
    method: str
    path: str
    user: str | None = None
    status: int | None = None
    time: float = field(default_factory=time.monotonic)

    def line(self, began: float) -> str:
        """Describe it in a line, with the seconds since a moment."""
        user = "" if self.user is None else f" by {self.user}"
        status = "no response" if self.status is None else self.status
        return f"{self.time - began:+9.3f} s  port {self.port}  {self.method} {self.path}{user}: {status}"


class Exchanges:
    """What the stand-ins were asked lately, and when the test that runs now began."""

    def __init__(self) -> None:
        self.open_ports: set[int] = set()
        self._kept: deque[Exchange] = deque(maxlen=KEPT)
        self._began = time.monotonic()

    def begin_test(self) -> None:
        """Forget what other tests asked, unless the stand-in serves on."""
        self._kept = deque((exchange for exchange in self._kept if exchange.port in self.open_ports), maxlen=KEPT)
        self._began = time.monotonic()

    def add(self, exchange: Exchange) -> Exchange:
        """Keep it, and forget the oldest."""
        self._kept.append(exchange)
        return exchange

    def __str__(self) -> str:
        return "\n".join(exchange.line(self._began) for exchange in tuple(self._kept))


def user_of(request: web.BaseRequest) -> str | None:
    """Return whom a request names, as far as its body was read: to read it here could wait for a slow client."""
    form = getattr(request, "_post", None) or {}
    named: Any = request.query.get("user") or request.query.get("created_by_end_user_session_id") or form.get("user")
    body = getattr(request, "_read_bytes", None)
    if named is None and body:
        try:
            named = json.loads(body).get("user")
        except (ValueError, AttributeError):
            return None
    return None if named is None else str(named)


exchanges = Exchanges()
