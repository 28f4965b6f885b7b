"""Responses of real Dify servers, as they were recorded."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aiohttp import web

ROOT = Path(__file__).parent.parent / "recorded"
# 1.17 is upstream's source of 2026-08-15, ten days before its release.
VERSIONS = ("1.12.1", "1.13.0", "1.14.2", "1.15.0", "1.16.1", "1.17")
RECORDED = ROOT / "1.12.1"

# They belong to one connection, which is the server's own business.
HOP_BY_HOP = ("connection", "content-length", "date", "keep-alive", "server", "transfer-encoding")


@dataclass(frozen=True)
class Recording:
    """One recorded response: status, headers, body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @classmethod
    def load(cls, name: str, version: str = "1.12.1") -> Recording:
        """
        Load the recording of a version, or of the nearest version that has one of this name.

        :param name: the file's name without ``.http``.
        :param version: one of :data:`VERSIONS`.
        :return: the recording.
        :raises FileNotFoundError: if no version has one.
        """
        return cls.read(find(name, version))

    @classmethod
    def read(cls, path: Path) -> Recording:
        """Read a recording from its file."""
        return _read(path)

    def fields(self) -> dict[str, Any]:
        """Return the JSON object in the body, a new one at each call."""
        fields: dict[str, Any] = json.loads(self.body)
        return fields

    def response(self) -> web.Response:
        """Return the response to send."""
        kept = {name: value for name, value in self.headers.items() if name.lower() not in HOP_BY_HOP}
        return web.Response(status=self.status, headers=kept, body=self.body)


def json_response(fields: Any, status: int = 200) -> web.Response:
    """Return a response with this JSON, with the header as Dify writes it: without a charset."""
    return web.Response(body=json.dumps(fields).encode(), status=status, content_type="application/json")


@functools.cache
def _read(path: Path) -> Recording:
    raw = path.read_bytes()
    # The recordings of 1.17 were written without the carriage returns.
    line_end = b"\r\n" if raw.partition(b"\n")[0].endswith(b"\r") else b"\n"
    while True:
        head, _, raw = raw.partition(line_end * 2)
        first, *lines = head.decode("latin-1").splitlines()
        status = int(first.split(" ")[1])
        if status != 100:
            return Recording(status, dict(line.split(": ", 1) for line in lines), raw)


def nearest(version: str) -> tuple[str, ...]:
    """Return the versions in the order in which a recording is looked for: its own, later ones, earlier ones."""
    own = VERSIONS.index(version)
    return (*VERSIONS[own:], *reversed(VERSIONS[:own]))


@functools.cache
def find(name: str, version: str) -> Path:
    """
    Return the file of a recording.

    :param name: the file's name without ``.http``.
    :param version: one of :data:`VERSIONS`.
    :return: the file of this version, or of the nearest one that has it.
    :raises FileNotFoundError: if no version has one.
    """
    for candidate in nearest(version):
        path = ROOT / candidate / f"{name}.http"
        if path.exists():
            return path
    raise FileNotFoundError(f"No version has a recording named {name}.")
