"""How a request travels on an event loop: redirects, bodies, and what an error names."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError, DifyRequestError
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import DifyStandIn, Start, html, redirect, reset, respond

UUID = "2d7a7544-770c-496f-8ef9-4e622682b330"

pytestmark = pytest.mark.usefixtures("dify_connection")


def ask(request: Callable[[DifyAsyncHook], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with DifyAsyncHook() as hook:
            return await request(hook)

    return asyncio.run(run())


def paths(dify: DifyStandIn) -> list[str]:
    return [request.path for request in dify.requests]


@pytest.mark.parametrize("where", ["/v1/workflows/logs?limit=1", "?limit=1", "{}/v1/workflows/logs?limit=1"])
@pytest.mark.parametrize("status", [300, 302, 308])
def test_a_redirect_within_the_server_names_its_own_query(dify: DifyStandIn, where: str, status: int) -> None:
    dify.add_logged_runs(3)
    dify.misbehave(redirect(where.format(dify.origin), status))
    assert len(ask(lambda hook: hook.list_workflow_runs(limit=2))) == 1
    assert paths(dify) == ["/v1/workflows/logs?page=1&limit=2", "/v1/workflows/logs?limit=1"]


def test_an_error_after_a_redirect_names_what_was_asked_for(dify: DifyStandIn) -> None:
    dify.misbehave(redirect("/v1/elsewhere"), html(404))
    with pytest.raises(DifyConnectionError, match=f"workflow run {UUID} at {dify.base_url}/workflows/run/{UUID}, not"):
        ask(lambda hook: hook.get_workflow_run(UUID))
    assert paths(dify) == [f"/v1/workflows/run/{UUID}", "/v1/elsewhere"]


def test_redirects_that_never_end_are_an_error(dify: DifyStandIn) -> None:
    dify.misbehave_always(redirect("/v1/elsewhere"))
    with pytest.raises(DifyConnectionError, match=r"is a redirect to /v1/elsewhere, where"):
        ask(lambda hook: hook.get_workflow_run(UUID))
    assert len(dify.requests) == 5


@pytest.mark.parametrize("where", ["http://other.example/v1/info", "http://[::1/x", "http://127.0.0.1:99999/"])
def test_a_redirect_elsewhere_is_not_followed(dify: DifyStandIn, where: str) -> None:
    dify.misbehave(redirect(where))
    with pytest.raises(DifyConnectionError, match="is a redirect to "):
        ask(lambda hook: hook.get_workflow_run(UUID))
    assert len(dify.requests) == 1


def test_what_is_no_redirect_is_not_followed(dify: DifyStandIn) -> None:
    body, headers = '{"code": "c", "message": "m"}', {"Location": "/v1/info", "X-Version": dify.dialect}
    dify.misbehave(respond(400, body, headers=headers))
    with pytest.raises(DifyRequestError, match=r"^m "):
        ask(lambda hook: hook.get_workflow_run(UUID))
    assert len(dify.requests) == 1


def test_a_stop_is_sent_with_its_user_and_follows_no_redirect(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running",)))

    async def start_and_stop(hook: DifyAsyncHook) -> str:
        async with await hook.start_workflow_run({}, "me") as run:
            dify.misbehave(redirect(f"{dify.base_url}/info"))
            with pytest.raises(DifyConnectionError, match="redirect"):
                await hook.stop_workflow_task(run.task_id, "me")
            await hook.stop_workflow_task(run.task_id, "me")
            return run.task_id

    task_id = ask(start_and_stop)
    assert dify.stopped == [(task_id, "me")]
    assert "/v1/info" not in paths(dify)


def test_a_look_that_is_sent_again_after_a_lost_connection_has_its_query(dify: DifyStandIn) -> None:
    dify.add_logged_runs(3)
    dify.misbehave(reset())
    assert len(ask(lambda hook: hook.list_workflow_runs(limit=2))) == 2
    assert paths(dify) == ["/v1/workflows/logs?page=1&limit=2"] * 2


def test_a_stop_that_is_sent_again_after_a_lost_connection_has_its_user(dify: DifyStandIn) -> None:
    dify.misbehave(reset())
    ask(lambda hook: hook.stop_workflow_task(UUID, "me"))
    assert len(dify.requests) == 2
    assert dify.stopped == [(UUID, "me")]


def test_a_server_that_is_away_is_named_with_what_was_asked_for(dify: DifyStandIn) -> None:
    why = f"could not be reached for workflow run {UUID} at {dify.base_url}/workflows/run/{UUID}"
    with dify.refusing_connections(), pytest.raises(DifyConnectionError, match=why):
        ask(lambda hook: hook.get_workflow_run(UUID))
