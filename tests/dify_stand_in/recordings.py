"""What real servers answered, as it was recorded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

RECORDED = Path(__file__).parent.parent / "recorded" / "1.12.1"


@dataclass(frozen=True)
class Recording:
    """One recorded answer: status, headers, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def load(cls, name: str) -> Recording:
        head, _, body = (RECORDED / f"{name}.http").read_bytes().partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        return cls(int(first.split(" ")[1]), headers, body)

    def fields(self) -> dict[str, Any]:
        return json.loads(self.body)

    def response(self) -> web.Response:
        kept = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "content-length", "date")}
        return web.Response(status=self.status, headers=kept, body=self.body)
