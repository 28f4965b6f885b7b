"""Starting and following runs on an event loop, over real sockets: with the promises of a start on a worker."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any

import aiohttp
import pytest

from airflow_provider_dify.api.run_stream import AsyncWorkflowRunStream
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Start,
    html,
    replay,
    respond,
    too_many_requests,
)

UUID = "2d7a7544-770c-496f-8ef9-4e622682b330"

pytestmark = pytest.mark.usefixtures("dify_connection")


def start(inputs: Any = None, user: Any = "airflow", **arguments: Any) -> tuple[str, str, list[str]]:
    """Start a run, and return its ids and the names of its events."""

    async def run() -> tuple[str, str, list[str]]:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run(inputs or {}, user, **arguments) as stream:
            return stream.workflow_run_id, stream.task_id, [event.name async for event in stream]

    return asyncio.run(run())


@pytest.mark.usefixtures("dialect")
def test_a_started_run_has_its_ids_and_its_events(dify: DifyStandIn) -> None:
    inputs = {"query": "héllo 你好", "obj": {"items": [1, None]}}
    run_id, task_id, names = start(inputs)
    (started,) = dify.started
    assert (run_id, task_id) == (started.workflow_run_id, started.task_id)
    assert (started.user, started.inputs, started.workflow_id) == ("airflow", inputs, None)
    assert (names[0] in {"node_started", "text_chunk"}, names[-1]) == (True, "workflow_finished")
    assert dify.requests[0].headers["Authorization"] == f"Bearer {API_KEY}"
    assert dify.requests[0].headers["Accept-Encoding"] == "identity"


def test_a_refused_key_raises_an_authentication_error(dify: DifyStandIn) -> None:
    dify.api_keys.clear()
    with pytest.raises(DifyAuthenticationError):
        start()
    assert len(dify.requests) == 1


def test_a_key_that_was_rotated_meanwhile_is_read_again_for_each_of_many_starts(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run() -> list[str]:
        async with DifyAsyncHook() as hook:
            new_key = f"{API_KEY}-new"
            dify.api_keys = {new_key}
            fields = {"conn_type": "dify", "host": dify.base_url, "password": new_key}
            monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
            streams = await asyncio.gather(*(hook.start_workflow_run({}, f"user {n}") for n in range(5)))
            for stream in streams:
                async with stream:
                    assert [event.name async for event in stream][-1] == "workflow_finished"
            return [stream.workflow_run_id for stream in streams]

    assert len(set(asyncio.run(run()))) == 5
    assert len(dify.started) == 5


@pytest.mark.parametrize(
    "fault", [lambda: too_many_requests(), lambda: replay("run_rate_limited_streaming"), lambda: html(404)]
)
def test_a_start_that_started_nothing_says_so(dify: DifyStandIn, fault: Callable[[], Any]) -> None:
    dify.misbehave(fault())
    with pytest.raises(DifyConnectionError):
        start()
    assert (len(dify.requests), dify.started) == (1, [])


def test_what_a_server_that_is_busy_asks_for_is_known(dify: DifyStandIn) -> None:
    dify.misbehave(respond(429, "", headers={"Retry-After": "7"}))
    with pytest.raises(DifyConnectionError) as caught:
        start()
    assert (caught.value.retry_after, caught.value.is_overloaded) == (7.0, True)


@pytest.mark.usefixtures("full_server")
def test_a_server_that_takes_no_connection_started_nothing_and_is_given_up_soon() -> None:
    began = time.monotonic()
    with pytest.raises(DifyConnectionError, match="could not be reached"):
        start()
    assert 0.3 <= time.monotonic() - began < 20


@pytest.mark.parametrize("dialect", ["1.16.1"], indirect=True)
def test_a_queued_start_is_waited_for_longer_than_the_client_would_by_itself(
    dify: DifyStandIn, dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp.client.DEFAULT_TIMEOUT", aiohttp.ClientTimeout(total=0.3))
    dify.slots = 0
    threading.Timer(1, setattr, (dify, "slots", None)).start()
    assert start()[2][-1] == "workflow_finished"
    assert len(dify.requests) == 1


def test_more_starts_than_a_client_has_connections_by_itself_wait_at_once(dify: DifyStandIn) -> None:
    async def run() -> int:
        async with DifyAsyncHook() as hook, AsyncExitStack() as stack:
            streams = await asyncio.gather(*(hook.start_workflow_run({}, f"user {n}") for n in range(120)))
            for stream in streams:
                await stack.enter_async_context(stream)
            return len(streams)

    dify.starts.extend([Start(statuses=("running",), cut="workflow_started", then="stall")] * 120)
    assert asyncio.run(asyncio.wait_for(run(), 30)) == 120


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_a_start_that_is_given_up_leaves_no_client_open(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, is_cancelled: bool
) -> None:
    dify.starts.append(Start(cut=0, then="stall"))

    async def run() -> None:
        task = asyncio.current_task()
        assert task
        if is_cancelled:
            asyncio.get_running_loop().call_later(0.3, task.cancel)
        async with DifyAsyncHook() as hook:
            await hook.start_workflow_run({}, "airflow", timeout=30 if is_cancelled else 0.3)

    with pytest.raises((asyncio.CancelledError, DifyWorkflowRunUncertain)):
        asyncio.run(run())
    gc.collect()
    assert len(dify.requests) == 1
    assert "Unclosed" not in caplog.text


def test_a_stream_that_has_ended_says_so_whenever_it_is_asked(dify: DifyStandIn) -> None:
    dify.starts.append(Start(cut=2000, then="close"))

    async def read(stream: AsyncWorkflowRunStream) -> None:
        while True:
            # No event yet is none, and no failure.
            await stream.next_event(0.0)
            await stream.next_event(5.0)

    async def run() -> None:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run({}, "airflow") as stream:
            with pytest.raises(DifyConnectionError, match="broke off"):
                await read(stream)
            with pytest.raises(DifyConnectionError, match="broke off"):
                await stream.next_event(0.0)

    asyncio.run(run())


def test_each_start_has_a_connection_of_its_own(dify: DifyStandIn) -> None:
    async def run() -> None:
        async with DifyAsyncHook() as hook:
            for _ in range(3):
                async with await hook.start_workflow_run({}, "airflow") as stream:
                    async for _event in stream:
                        pass

    asyncio.run(run())
    assert dify.connections_opened == 3


def test_a_run_that_is_closed_hangs_up_and_waits_for_nothing(dify: DifyStandIn) -> None:
    dify.starts.append(Start(duration=60.0))

    async def run() -> float:
        async with DifyAsyncHook() as hook:
            began = time.monotonic()
            async with await hook.start_workflow_run({}, "airflow") as stream:
                assert (await stream.next_event(0.5)) is not None
            return time.monotonic() - began

    assert asyncio.run(run()) < 20


def test_many_runs_at_once_share_the_loop(dify: DifyStandIn) -> None:
    async def one(hook: DifyAsyncHook, number: int) -> str:
        async with await hook.start_workflow_run({"n": number}, f"user {number}") as stream:
            assert [event.name async for event in stream][-1] == "workflow_finished"
            return stream.workflow_run_id

    async def run() -> list[str]:
        async with DifyAsyncHook() as hook:
            return await asyncio.gather(*(one(hook, number) for number in range(40)))

    dify.starts += [Start(duration=1.0) for _ in range(40)]
    began = time.monotonic()
    assert len(set(asyncio.run(run()))) == 40
    assert time.monotonic() - began < 30
