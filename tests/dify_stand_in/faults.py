"""Responses that go wrong, over a real socket. A fault takes a request and responds to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.dify_stand_in.recordings import Recording

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn

Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]


def respond(
    status: int,
    body: bytes | str = b"",
    *,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> Fault:
    """Answer with this status and body."""

    async def fault(request: web.Request) -> web.StreamResponse:
        raw = body.encode() if isinstance(body, str) else body
        return web.Response(status=status, body=raw, headers={"Content-Type": content_type, **(headers or {})})

    return fault


def replay(name: str) -> Fault:
    """Answer with a recording."""

    async def fault(request: web.Request) -> web.StreamResponse:
        return Recording.load(name).response()

    return fault


def too_many_requests(retry_after: str | None = None) -> Fault:
    """Answer 429, with the ``Retry-After`` that proxies send."""
    body = {"code": "too_many_requests", "message": "Too many requests. Please try again later.", "status": 429}
    return respond(429, json.dumps(body), headers={"Retry-After": retry_after} if retry_after else {})


def html(status: int = 200, text: str = "<html><title>Sign in</title></html>") -> Fault:
    """Answer with a page, as a proxy or a login wall does."""
    return respond(status, text, content_type="text/html; charset=utf-8")


def redirect(location: str, status: int = 302) -> Fault:
    """Redirect elsewhere."""
    return respond(status, headers={"Location": location})


def reset() -> Fault:
    """Reset the connection before anything is answered."""

    async def fault(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    return fault


def truncate_body(*, reset: bool, length: int = 1000) -> Fault:
    """Announce a body, send the beginning of it, then reset or close the connection."""

    async def fault(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json", "Content-Length": str(length)})
        await response.prepare(request)
        await response.write(b'{"id": "')
        assert request.transport is not None
        if reset:
            request.transport.abort()
        else:
            request.transport.close()
        return response

    return fault


def stall(seconds: float) -> Fault:
    """Take the request and say nothing for a while."""

    async def fault(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(seconds)
        return web.Response(status=504)

    return fault


def slow_body(dify: DifyStandIn, seconds: float, pieces: int = 10) -> Fault:
    """Respond as Dify does, but in pieces over a while."""

    async def fault(request: web.Request) -> web.StreamResponse:
        right = await dify.respond_to(request)
        assert isinstance(right, web.Response)
        body = right.body
        assert isinstance(body, bytes)
        response = web.StreamResponse(status=right.status, headers={"Content-Type": "application/json"})
        response.content_length = len(body)
        await response.prepare(request)
        step = max(1, len(body) // pieces)
        for start in range(0, len(body), step):
            await response.write(body[start : start + step])
            await asyncio.sleep(seconds / pieces)
        return response

    return fault


def retry_after_date(moment: Any) -> str:
    """Write a moment as HTTP does."""
    return format_datetime(moment, usegmt=True)
