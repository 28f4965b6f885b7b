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
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Start,
    html,
    redirect,
    replay,
    reset,
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


def test_a_published_version_can_be_started(dify: DifyStandIn) -> None:
    start(workflow_id=UUID.upper())
    assert dify.started[0].workflow_id == UUID


@pytest.mark.parametrize(
    ("recording", "message", "expected"),
    [
        ("run_streaming_missing_input", "query is required in input form", DifyInputsRejected),
        ("run_unpublished", "Workflow not published", DifyRequestError),
        ("run_by_id_unknown", "Workflow not found with id", DifyRequestError),
    ],
)
def test_a_rejected_start_says_what_dify_said(
    dify: DifyStandIn, recording: str, message: str, expected: type[DifyError]
) -> None:
    dify.misbehave(replay(recording))
    with pytest.raises(expected, match=message):
        start()
    assert len(dify.requests) == 1


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


def test_a_server_that_refuses_connections_started_nothing(dify: DifyStandIn) -> None:
    with dify.refusing_connections(), pytest.raises(DifyConnectionError, match=r"ClientConnectorError.*be reached"):
        start()
    start()


@pytest.mark.parametrize(
    "fault",
    [
        lambda: reset(),
        lambda: respond(500, '{"code": "internal_server_error", "message": "broken"}'),
        lambda: replay("run_redis_down"),
        lambda: html(504),
        lambda: html(200),
        lambda: respond(200, "", content_type="text/event-stream"),
        lambda: respond(200, "data: {broken\n\n", content_type="text/event-stream"),
    ],
)
def test_a_start_that_may_have_started_a_run_is_not_sent_again(dify: DifyStandIn, fault: Callable[[], Any]) -> None:
    dify.misbehave(fault())
    with pytest.raises(DifyWorkflowRunUncertain, match=r"may or may not have started.*'airflow'") as caught:
        start()
    assert caught.value.user == "airflow"
    assert len(dify.requests) == 1


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("cut", [0, 10])
def test_a_stream_that_breaks_before_the_run_is_named_leaves_it_uncertain(
    dify: DifyStandIn, then: str, cut: int
) -> None:
    dify.starts.append(Start(cut=cut, then=then))
    with pytest.raises(DifyWorkflowRunUncertain):
        start()
    assert len(dify.started) == 1


@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_stream_that_breaks_later_says_so_and_the_run_is_known(dify: DifyStandIn, then: str) -> None:
    dify.starts.append(Start(cut=2000, then=then, piece=97))
    with pytest.raises(DifyConnectionError, match=r"events of workflow run .* broke off .*The run continues\."):
        start()
    assert len(dify.started) == 1


def test_silence_is_a_queued_run_and_not_a_failure(dify: DifyStandIn) -> None:
    dify.starts.append(Start(cut=0, then="stall"))
    began = time.monotonic()
    why = r"did not name the run of user 'airflow' within 0\.3 seconds"
    with pytest.raises(DifyWorkflowRunUncertain, match=why) as caught:
        start(timeout=0.3)
    assert caught.value.user == "airflow"
    assert time.monotonic() - began >= 0.3


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


def test_a_start_follows_no_redirect(dify: DifyStandIn) -> None:
    dify.misbehave(redirect(f"{dify.base_url}/workflows/run", 307))
    with pytest.raises(DifyConnectionError, match="redirect"):
        start()
    assert dify.started == []


@pytest.mark.parametrize("user", ["", None, "x" * 256, 5])
def test_an_invalid_user_fails_before_any_request(dify: DifyStandIn, user: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="user must be text"):
        start(user=user)
    assert dify.requests == []


def test_inputs_that_are_not_json_fail_before_any_request(dify: DifyStandIn) -> None:
    with pytest.raises(DifyConfigurationError, match="inputs must be"):
        start({"a": object()})
    assert dify.requests == []


def test_the_key_is_in_no_error_and_no_event_of_a_start(dify: DifyStandIn) -> None:
    dify.misbehave(respond(500, json.dumps({"message": f"bad {API_KEY}"})))
    with pytest.raises(DifyWorkflowRunUncertain) as caught:
        start()
    assert API_KEY not in str(caught.value)


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
