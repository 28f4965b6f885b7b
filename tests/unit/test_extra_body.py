"""Fields of one's own in the body of a start, over real HTTP."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import DifyStandIn

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")

FILES = [{"type": "image", "transfer_method": "remote_url", "url": "https://example.com/a.png"}]
EXTRA = {"files": FILES, "ø": None}


@pytest.fixture
def bodies(dify: DifyStandIn) -> list[Any]:
    """The bodies of the starts that reached the stand-in."""
    received: list[Any] = []

    async def note(request: Any) -> Any:
        received.append(json.loads(await request.read()))
        return await dify.respond_to(request)

    dify.misbehave_always(note, only="POST .*/run$")
    return received


def start(extra: Any) -> None:
    DifyHook().start_workflow_run({"query": "x"}, "me", extra_body=extra).close()


def run(extra: Any) -> None:
    DifyHook().run_workflow({"query": "x"}, "me", poll_interval=0.05, extra_body=extra)


def start_on_an_event_loop(extra: Any) -> None:
    async def work() -> None:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run({"query": "x"}, "me", extra_body=extra):
            pass

    asyncio.run(work())


def run_on_an_event_loop(extra: Any) -> None:
    async def work() -> None:
        async with DifyAsyncHook() as hook:
            await hook.run_workflow({"query": "x"}, "me", poll_interval=0.05, extra_body=extra)

    asyncio.run(work())


EACH = pytest.mark.parametrize("work", [start, run, start_on_an_event_loop, run_on_an_event_loop])


@EACH
def test_fields_of_ones_own_go_along_with_a_start(bodies: list[Any], work: Callable[[Any], None]) -> None:
    work(EXTRA)
    assert bodies == [{"inputs": {"query": "x"}, "user": "me", "response_mode": "streaming", **EXTRA}]


@EACH
@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"user": "root"}, "extra_body must not have 'user', which the provider sends itself"),
        ({"files": [], "inputs": {}}, "extra_body must not have 'inputs'"),
        ({"response_mode": "blocking"}, "extra_body must not have 'response_mode'"),
        ({"n": float("nan")}, "extra_body must be an object of JSON values"),
        ({"n": object()}, "extra_body must be an object of JSON values"),
        ("text", "extra_body must be an object of JSON values"),
    ],
)
def test_what_the_provider_sends_itself_and_what_is_no_json_is_refused_before_a_start(
    dify: DifyStandIn, bodies: list[Any], work: Callable[[Any], None], extra: Any, message: str
) -> None:
    with pytest.raises(DifyConfigurationError, match=message):
        work(extra)
    assert bodies == []
    assert dify.started == []
