"""Responses that go wrong, over a real socket. A fault takes a request and responds to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.dify_stand_in.recordings import Recording

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn

Fault = Callable[[web.Request], Awaitable[web.StreamResponse]]
STAND_IN: web.AppKey[DifyStandIn] = web.AppKey("stand_in")


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


def rejects(status: int, code: str, message: str, *, content_type: str = "application/json") -> Fault:
    """Respond as Dify itself does when it rejects a request: with its three fields and its ``X-Version``."""

    async def fault(request: web.Request) -> web.StreamResponse:
        body = json.dumps({"code": code, "message": message, "status": status})
        headers = {"X-Version": request.app[STAND_IN].dialect_rules.server_version}
        return await respond(status, body, content_type=content_type, headers=headers)(request)

    return fault


def replay(name: str, version: str | None = None) -> Fault:
    """Respond with a recording, by default of the version that the stand-in speaks like."""

    async def fault(request: web.Request) -> web.StreamResponse:
        stand_in = request.app[STAND_IN]
        return Recording.load(name, version or stand_in.dialect).response()

    return fault


def too_many_requests(retry_after: str | None = None) -> Fault:
    """Answer 429, with the ``Retry-After`` that proxies send."""
    body = {"code": "too_many_requests", "message": "Too many requests. Please try again later.", "status": 429}
    return respond(429, json.dumps(body), headers={"Retry-After": retry_after} if retry_after else {})


def quota_reached(retry_after: str | None = None) -> Fault:
    """Respond 429 ``rate_limit_error``: the plan's quota of runs is used up (from the source; Dify Cloud only)."""
    message = "Workflow execution quota limit reached for tenant 46e43c4b-4b6b-4a9a-bc99-14cc4754a332"
    body = {"code": "rate_limit_error", "message": message, "status": 429}
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


def close() -> Fault:
    """Close the connection before anything is answered."""

    async def fault(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        request.transport.close()
        return web.Response()

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


def lose_response(then: Fault) -> Fault:
    """Let a start reach Dify, which takes it, but let the client get this fault instead of the response."""

    async def fault(request: web.Request) -> web.StreamResponse:
        await request.app[STAND_IN].routes.accept_start(request)
        return await then(request)

    return fault


def pings_only(interval: float = 0.05) -> Fault:
    """Respond with an event stream that has pings, and nothing else, for ever. No run is started."""
    return dribble(b"event: ping\n\n", interval, content_type="text/event-stream")


def dribble(data: bytes = b" ", interval: float = 0.05, *, content_type: str = "application/json") -> Fault:
    """Respond with a body that repeats these bytes, for ever."""

    async def fault(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": content_type})
        await response.prepare(request)
        with contextlib.suppress(ConnectionError):
            while True:
                await response.write(data)
                await asyncio.sleep(interval)
        return response

    return fault


def dribble_headers(interval: float = 0.05) -> Fault:
    """Respond with a header that goes on for ever, one byte at a time."""

    async def fault(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)
        transport.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nX-Padding: ")
        while not transport.is_closing():
            transport.write(b"x")
            await asyncio.sleep(interval)
        return web.Response()

    return fault


def unchunked(interval: float = 0.01, piece: int = 64) -> Fault:
    """Respond as Dify does, but as HTTP/1.0: neither chunked nor with a length, in pieces, and closed at its end."""

    async def fault(request: web.Request) -> web.StreamResponse:
        stand_in = request.app[STAND_IN]
        transport = request.transport
        assert isinstance(transport, asyncio.Transport)

        async def write(data: bytes) -> None:
            for begin in range(0, len(data), piece):
                transport.write(data[begin : begin + piece])
                await asyncio.sleep(interval)

        def begin_response(status: int, content_type: str) -> None:
            head = f"HTTP/1.0 {status} -\r\nContent-Type: {content_type}\r\nX-Version: {stand_in.dialect}\r\n"
            transport.write(f"{head}Connection: close\r\n\r\n".encode())

        accepted: Any = None
        if request.method == "POST" and request.path.endswith("/run"):
            accepted = await stand_in.routes.accept_start(request)
        if accepted is None or isinstance(accepted, web.Response):
            right = await stand_in.respond_to(request) if accepted is None else accepted
            assert isinstance(right, web.Response)
            assert isinstance(right.body, bytes)
            begin_response(right.status, right.content_type)
            await write(right.body)
        else:
            begin_response(200, "text/event-stream")
            await stand_in.routes.starts.send(accepted, request, write)
        transport.close()
        return web.Response()

    return fault


def retry_after_date(moment: Any) -> str:
    """Write a moment as HTTP does."""
    return format_datetime(moment, usegmt=True)
