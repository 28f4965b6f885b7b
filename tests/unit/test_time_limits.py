"""Whatever a server does with its bytes, a request ends when its time is over, and a task when Airflow ends it."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.combinations import pairs
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Start,
    dribble,
    dribble_headers,
    pings_only,
    respond,
    stall,
    too_many_requests,
)

# A busy machine needs more seconds than a test asks for; only a hang needs so many.
HANG_SECONDS = 40.0
RUN_ID = "2d7a7544-770c-496f-8ef9-4e622682b330"
Connect = Callable[..., None]


@pytest.fixture(autouse=True)
def connect(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> Connect:
    """Make the connection ``dify_default`` lead to the stand-in, or elsewhere, with this timeout."""

    def make(timeout: float, host: str = dify.base_url) -> None:
        fields = {"conn_type": "dify", "host": host, "password": API_KEY, "extra": {"timeout": timeout}}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))

    make(0.5)
    return make


def look_up() -> None:
    with DifyHook(retry_limit=0) as hook:
        hook.get_workflow_run(RUN_ID)


def look_up_on_an_event_loop() -> None:
    async def ask() -> None:
        async with DifyAsyncHook() as hook:
            await hook.get_workflow_run(RUN_ID)

    asyncio.run(ask())


def stop() -> None:
    with DifyHook(retry_limit=0) as hook:
        hook.stop_workflow_task(RUN_ID, "airflow")


def press_the_test_button() -> None:
    is_good, message = DifyHook().test_connection()
    assert not is_good
    raise DifyConnectionError(message)


SERVERS: dict[str, Any] = {
    "dribbles its body": dribble(interval=0.02),
    "dribbles its headers": dribble_headers(0.02),
    "is silent": stall(60),
}
EACH_SERVER = [pytest.param(fault, id=name) for name, fault in SERVERS.items()]


@pytest.mark.parametrize(
    ("ask", "fault"), pairs([look_up, look_up_on_an_event_loop, stop, press_the_test_button], EACH_SERVER)
)
def test_a_request_ends_when_its_time_is_over(dify: DifyStandIn, ask: Callable[[], None], fault: Any) -> None:
    dify.misbehave_always(fault)
    began = time.monotonic()
    with pytest.raises(DifyConnectionError):
        ask()
    took = time.monotonic() - began
    assert 0.4 < took < HANG_SECONDS


@pytest.mark.parametrize(
    "fault",
    [pings_only(0.02), dribble_headers(0.02), stall(60), dribble(b": x\n", 0.02, content_type="text/event-stream")],
)
def test_a_start_that_names_no_run_ends_when_its_time_is_over(dify: DifyStandIn, fault: Any) -> None:
    dify.misbehave_always(fault)
    began = time.monotonic()
    with DifyHook() as hook, pytest.raises(DifyWorkflowRunUncertain, match="did not name the run of user 'airflow'"):
        hook.start_workflow_run({}, "airflow", timeout=0.3)
    assert time.monotonic() - began < HANG_SECONDS
    assert len(dify.requests) == 1


def test_a_look_up_of_a_name_that_hangs_ends_when_its_time_is_over(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()

    def hang(*args: Any, **kwargs: Any) -> Any:
        released.wait(60)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    connect(0.5, "http://dify.invalid")
    monkeypatch.setattr(socket, "getaddrinfo", hang)
    began = time.monotonic()
    with pytest.raises(DifyConnectionError, match=r"no whole response within 0\.5 seconds"):
        look_up()
    assert time.monotonic() - began < HANG_SECONDS
    released.set()


def test_no_attempt_is_made_or_waited_for_after_the_deadline(dify: DifyStandIn) -> None:
    dify.misbehave_always(too_many_requests("300"))
    began = time.monotonic()
    with DifyHook(retry_limit=3) as hook:
        hook.deadline = time.time() + 200
        with pytest.raises(DifyConnectionError):
            hook.get_workflow_run(RUN_ID)
    assert time.monotonic() - began < HANG_SECONDS
    assert len(dify.requests) == 1


def test_a_request_near_the_deadline_ends_with_it(dify: DifyStandIn, connect: Connect) -> None:
    connect(60)
    dify.misbehave_always(dribble(interval=0.02))
    began = time.monotonic()
    with DifyHook(retry_limit=3) as hook:
        # The last request has a second, so that it is one.
        hook.deadline = time.time() + 0.1
        with pytest.raises(DifyConnectionError, match="no whole response within 1 seconds"):
            hook.get_workflow_run(RUN_ID)
    assert time.monotonic() - began < HANG_SECONDS


async def on_an_event_loop(ask: Callable[[DifyAsyncHook], Awaitable[Any]]) -> None:
    async with DifyAsyncHook() as hook:
        await ask(hook)


WAITS: dict[str, Callable[[], Any]] = {
    "wait": lambda: DifyHook().wait_for_workflow_run(RUN_ID, timeout=0.3),
    "run": lambda: DifyHook().run_workflow({}, "me", timeout=0.3),
    "start": lambda: DifyHook().start_workflow_run({}, "me", timeout=0.3),
    "run on an event loop": lambda: asyncio.run(
        on_an_event_loop(lambda hook: hook.run_workflow({}, "me", timeout=0.3))
    ),
    "start on an event loop": lambda: asyncio.run(
        on_an_event_loop(lambda hook: hook.start_workflow_run({}, "me", timeout=0.3))
    ),
}


@pytest.mark.parametrize(
    ("wait", "fault"),
    pairs(
        [pytest.param(wait, id=name) for name, wait in WAITS.items()],
        [
            pytest.param(stall(60), id="silent"),
            pytest.param(respond(503), id="503"),
            pytest.param(too_many_requests(), id="429"),
            pytest.param(dribble(interval=0.02), id="dribbling"),
        ],
    ),
)
def test_a_wait_of_the_hook_ends_within_its_timeout_and_a_short_request(
    dify: DifyStandIn, connect: Connect, fault: Any, wait: Callable[[], Any]
) -> None:
    connect(60)
    dify.misbehave_always(fault)
    began = time.monotonic()
    with pytest.raises(DifyError):
        wait()
    assert time.monotonic() - began < HANG_SECONDS


def test_a_wait_of_the_hook_leaves_no_limit_to_its_next_requests(dify: DifyStandIn, connect: Connect) -> None:
    run_id = dify.add_run("running")
    hook = DifyHook(retry_delay=0.01)
    with hook, pytest.raises(DifyError):
        hook.wait_for_workflow_run(run_id, timeout=0.01)
    assert hook.deadline is None
    dify.misbehave(respond(503), times=3)
    assert hook.get_workflow_run(run_id).status == "running"


class Killed(BaseException):
    """What Airflow raises in the main thread when a task's time is over."""


@pytest.mark.parametrize("fault", SERVERS.values(), ids=SERVERS.keys())
def test_a_request_ends_at_once_when_airflow_ends_the_task(
    dify: DifyStandIn, connect: Connect, fault: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import signal

    connect(60)
    dify.misbehave_always(fault)

    def on_alarm(*_: object) -> None:
        raise Killed

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    began = time.monotonic()
    try:
        with pytest.raises(Killed):
            look_up()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < HANG_SECONDS


def test_a_stream_that_is_closed_leaves_no_thread_behind(dify: DifyStandIn) -> None:
    dify.starts.append(Start(duration=30.0))
    with DifyHook() as hook:
        hook.start_workflow_run({}, "airflow").close()
    began = time.monotonic()
    while any(thread.name == "dify-start" for thread in threading.enumerate()):
        assert time.monotonic() - began < HANG_SECONDS
        time.sleep(0.01)


def test_an_event_is_not_waited_for_longer_than_asked(dify: DifyStandIn) -> None:
    dify.starts.append(Start(cut="workflow_started", then="stall"))
    with DifyHook() as hook, hook.start_workflow_run({}, "airflow") as stream:
        began = time.monotonic()
        for _ in range(3):
            assert stream.next_event(0.1) is None
        assert 0.3 <= time.monotonic() - began < HANG_SECONDS


@pytest.mark.usefixtures("full_server")
def test_a_start_whose_connection_nobody_takes_is_given_up_soon() -> None:
    began = time.monotonic()
    with DifyHook(retry_limit=0) as hook, pytest.raises(DifyConnectionError, match="could not be reached"):
        hook.start_workflow_run({}, "airflow", timeout=60)
    assert 0.3 <= time.monotonic() - began < HANG_SECONDS


def test_the_hook_works_again_after_a_request_that_was_given_up(dify: DifyStandIn) -> None:
    run_id = dify.add_run("succeeded")
    dify.misbehave(dribble(interval=0.02))
    with DifyHook(retry_limit=0) as hook:
        with pytest.raises(DifyError):
            hook.get_workflow_run(run_id)
        assert hook.get_workflow_run(run_id).status == "succeeded"
