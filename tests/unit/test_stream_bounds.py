"""A stream that floods its reader takes a bounded part of the memory, on a worker and on an event loop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import DifyStandIn

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")

MB = 1024 * 1024
# What the sockets of both sides may hold: Linux lets one grow to some 36 MB.
IN_SOCKETS = 48 * MB


class Flood:
    """
    The response to a start that begins a run's events, and goes on with a piece again and again.

    :param piece: returns the piece of a number.
    :param count: how many pieces there are; then the run's end, if they are events.
    :ivar sent: bytes that the client has taken so far, or its socket for it.
    """

    def __init__(self, piece: Callable[[int], bytes], count: int, *, ends: bool = True) -> None:
        self.run_id = str(uuid.uuid4())
        self.sent = 0
        self.is_over = False
        self._piece = piece
        self._count = count
        self._ends = ends

    def event(self, name: str, **data: Any) -> bytes:
        ids = {"workflow_run_id": self.run_id, "task_id": str(uuid.uuid4())}
        return b"data: " + json.dumps({"event": name, **ids, "data": data}).encode() + b"\n\n"

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "X-Version": "1.16.1"})
        await response.prepare(request)
        await response.write(self.event("workflow_started"))
        with contextlib.suppress(ConnectionError):
            for number in range(self._count):
                piece = self._piece(number)
                await response.write(piece)
                # asyncio of Python 3.12.0 to 3.13.0 takes what aiohttp writes into its memory without an end.
                while not (request.transport is None or request.transport.get_write_buffer_size() < MB):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
                self.sent += len(piece)
            await response.write(self.event("workflow_finished", status="succeeded") if self._ends else b"\n\n")
        self.is_over = True
        return response

    def is_still(self, seconds: float = 0.5) -> bool:
        """Return whether it has sent all that the client takes for now."""
        before = self.sent
        time.sleep(seconds)
        return self.sent == before and before > 0


def text_chunks(size: int) -> Callable[[int], bytes]:
    text = "x" * size
    return lambda number: (
        b'data: {"event": "text_chunk", "data": {"number": %d, "text": "%b"}}\n\n'
        % (
            number,
            text.encode(),
        )
    )


SIZES = pytest.mark.parametrize(
    ("size", "count"),
    [pytest.param(1024, 60_000, id="many", marks=pytest.mark.long), pytest.param(MB, 100, id="large")],
)


def assert_bounded(flood: Flood) -> None:
    until = time.monotonic() + 60
    while not flood.is_still():
        assert time.monotonic() < until
    # The events that wait for their reader, and one that is under way.
    assert not flood.is_over
    assert flood.sent < 16 * MB + 2 * MB + IN_SOCKETS


@SIZES
def test_a_slow_reader_on_a_worker_holds_the_stream_up(dify: DifyStandIn, size: int, count: int) -> None:
    flood = Flood(text_chunks(size), count)
    dify.misbehave(flood, only="POST")
    with DifyHook() as hook, hook.start_workflow_run({}, "me") as stream:
        assert_bounded(flood)
        events = list(stream)
    assert [event.data.get("number") for event in events] == [*range(count), None]


@SIZES
def test_a_slow_reader_on_an_event_loop_holds_the_stream_up(dify: DifyStandIn, size: int, count: int) -> None:
    flood = Flood(text_chunks(size), count)
    dify.misbehave(flood, only="POST")

    async def read() -> list[Any]:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run({}, "me") as stream:
            await asyncio.to_thread(assert_bounded, flood)
            return [event.data.get("number") async for event in stream]

    assert asyncio.run(read()) == [*range(count), None]


def test_a_stream_that_is_held_up_can_be_closed_at_once(dify: DifyStandIn) -> None:
    flood = Flood(text_chunks(1024), 60_000)
    dify.misbehave(flood, flood, only="POST")
    with DifyHook() as hook:
        stream = hook.start_workflow_run({}, "me")
        assert_bounded(flood)
        stream.close()
    began = time.monotonic()
    while any(thread.name == "dify-start" for thread in threading.enumerate()):
        assert time.monotonic() - began < 60
        time.sleep(0.01)

    async def close() -> None:
        async with DifyAsyncHook() as hook:
            stream = await hook.start_workflow_run({}, "me")
            await asyncio.to_thread(flood.is_still)
            stream.close()
            await stream.wait_closed()

    began = time.monotonic()
    asyncio.run(close())
    assert time.monotonic() - began < 60


def on_a_worker() -> WorkflowRun:
    with DifyHook() as hook:
        # Airflow's own logger goes past pytest.
        hook._log = logging.getLogger("run")
        return hook.run_workflow({}, "me", poll_interval=0.5)


def on_an_event_loop() -> WorkflowRun:
    async def run() -> WorkflowRun:
        async with DifyAsyncHook() as hook:
            return await hook.run_workflow({}, "me", poll_interval=0.5)

    return asyncio.run(run())


@pytest.mark.parametrize("run_workflow", [on_a_worker, on_an_event_loop])
@pytest.mark.parametrize("piece", [b"x" * 65_536, b"data: " + b"x" * 65_536 + b"\n"], ids=["a line", "lines"])
def test_an_event_that_does_not_end_ends_the_stream_and_the_run_is_polled(
    dify: DifyStandIn, run_workflow: Callable[[], WorkflowRun], piece: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    flood = Flood(lambda number: piece if number else b"data: " + piece, 1_600, ends=False)
    dify.add_run("succeeded", run_id=flood.run_id, duration=0)
    dify.misbehave(flood, only="POST")
    assert run_workflow().status == "succeeded"
    assert "an event of more than 8 MB without an end: the events of workflow run" in caplog.text
    assert flood.sent < 8 * MB + 2 * MB + IN_SOCKETS


def test_an_event_that_does_not_end_is_an_error_for_who_follows_the_events(dify: DifyStandIn) -> None:
    dify.misbehave(Flood(lambda _: b"x" * 65_536, 1_600, ends=False), only="POST")
    why = pytest.raises(DifyConnectionError, match="more than 8 MB without an end")
    with DifyHook() as hook, hook.start_workflow_run({}, "me") as stream, why:
        list(stream)
