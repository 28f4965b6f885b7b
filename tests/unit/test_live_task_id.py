"""The task's id of a run that was found in Dify's log, over real sockets, by both hooks."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest
from aiohttp import web

from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.runs.stopping import StopReport, stop_run
from tests.dify_stand_in import API_KEY, DifyStandIn, redirect, reset, respond, stall
from tests.dify_stand_in.faults import Fault
from tests.unit.relays import ForwardProxy

pytestmark = pytest.mark.usefixtures("dify_connection")

RUN_ID = "2d7a7544-770c-496f-8ef9-4e622682b330"
TASK_ID = "77b720b7-eaf5-4cfd-95ab-a25d6b783f74"
# Measured on Dify 1.14.2 and 1.16.1: a run that is over has one event, with the run's id in place of the task's.
OF_THE_PAST = {"event": "workflow_finished", "task_id": RUN_ID, "workflow_run_id": RUN_ID, "data": {}}
LIVE = {"event": "node_finished", "task_id": TASK_ID, "workflow_run_id": RUN_ID, "data": {}}
PING = "event: ping\n\n"
SECONDS = "airflow_provider_dify.runs.stopping._SECONDS_FOR_TASK_ID"


def line(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"


def events(*parts: str, pause: float = 0.0, status: int = 200, end: bool = True) -> Fault:
    """Respond with an event stream of these parts, with pauses between them."""

    async def fault(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=status, headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for part in parts:
            await response.write(part.encode())
            await asyncio.sleep(pause)
        if not end:
            await asyncio.sleep(60)
        return response

    return fault


def stop_on_a_worker(workflow_run_id: str) -> StopReport:
    with DifyHook(retry_limit=0) as hook:
        return hook.run_on_loop(lambda client: stop_run(client, workflow_run_id, None, "airflow"))


def stop_on_the_triggerer(workflow_run_id: str) -> StopReport:
    async def stop() -> StopReport:
        async with DifyAsyncHook() as hook:
            return await stop_run(hook, workflow_run_id, None, "airflow")

    return asyncio.run(stop())


Stop = Callable[[str], StopReport]


@pytest.fixture(params=[stop_on_a_worker, stop_on_the_triggerer], ids=["worker", "triggerer"])
def stop(request: pytest.FixtureRequest) -> Stop:
    found: Stop = request.param
    return found


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the id be waited for longer than a busy machine takes; a stream that goes on stays open for longer still."""
    monkeypatch.setattr(SECONDS, 30.0)


@pytest.mark.parametrize(
    "fault",
    [
        events(line(LIVE)),
        # The run continues, and so does the stream.
        events(PING, line(LIVE), end=False),
        events(PING, line(OF_THE_PAST), line(LIVE), pause=0.05),
        events(PING + line(OF_THE_PAST) + line(LIVE)),
        events(line(LIVE)[:20], line(LIVE)[20:], pause=0.05),
    ],
    ids=["at_once", "open", "after_the_past", "in_one_piece", "in_two_pieces"],
)
def test_a_run_whose_task_is_not_known_is_stopped_by_its_next_event(
    dify: DifyStandIn, stop: Stop, fault: Fault
) -> None:
    dify.misbehave(fault, only="/events")
    assert stop(RUN_ID).was_asked
    assert dify.stopped == [(TASK_ID, "airflow")]
    (asked,) = [seen for seen in dify.requests if "/events" in seen.path]
    assert asked.path == f"/v1/workflow/{RUN_ID}/events?user=airflow"
    assert asked.headers["Authorization"] == f"Bearer {API_KEY}"


@pytest.mark.parametrize(
    "fault",
    [
        events(line(OF_THE_PAST)),
        events(line({**LIVE, "task_id": ""})),
        events(PING, end=False),
        events(line(LIVE), status=404),
        events("data: {broken\n\n" + "data: " + "[" * 10_000 + "\n\n"),
        events(*("x" * 10,) * 600, pause=0.1, end=False),
        respond(200, "<html>Sign in</html>", content_type="text/html"),
        respond(204),
        reset(),
        stall(60),
        # As a server that has no such route.
        None,
    ],
    ids=["past", "no_task", "pings", "unknown", "broken", "endless", "page", "empty", "reset", "stall", "no_route"],
)
def test_a_run_whose_task_stays_unknown_goes_on_and_that_is_said_in_time(
    dify: DifyStandIn, stop: Stop, fault: Fault | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SECONDS, 0.5)
    if fault is not None:
        dify.misbehave(fault, only="/events")
    began = time.monotonic()
    report = stop(RUN_ID)
    assert time.monotonic() - began < 30
    assert dify.stopped == []
    assert not report.was_asked
    assert report.message == (
        f"Workflow run {RUN_ID} keeps running: its task id, which Dify's stop route takes, is not known."
    )


def test_the_api_key_follows_no_redirect_of_the_events(dify: DifyStandIn, stop: Stop) -> None:
    with DifyStandIn() as other:
        dify.misbehave(redirect(f"{other.origin}/events"), only="/events")
        assert not stop(RUN_ID).was_asked
        assert other.requests == []


def test_the_events_are_asked_for_through_the_connections_proxy(
    dify: DifyStandIn, stop: Stop, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    dify.misbehave(events(line(LIVE), end=False), only="/events")
    with ForwardProxy(dify.port) as proxy:
        extra = {"proxies": {"http": f"http://127.0.0.1:{proxy.port}"}}
        # A host that only the proxy knows.
        fields = {"conn_type": "dify", "host": "http://dify.invalid/v1", "password": API_KEY, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
        assert stop(RUN_ID).was_asked
    assert dify.stopped == [(TASK_ID, "airflow")]
