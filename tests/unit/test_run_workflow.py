"""``run_workflow`` of both hooks: one call from the start to the end, over real sockets."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyConnectionError,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import DifyStandIn, Start, lose_response, replay, reset, respond

UUID = "2d7a7544-770c-496f-8ef9-4e622682b330"
RunWorkflow = Callable[..., WorkflowRun]

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")


def on_a_worker(inputs: dict[str, Any], user: str, **arguments: Any) -> WorkflowRun:
    with DifyHook() as hook:
        return hook.run_workflow(inputs, user, poll_interval=0.05, **arguments)


def on_an_event_loop(inputs: dict[str, Any], user: str, **arguments: Any) -> WorkflowRun:
    async def run() -> WorkflowRun:
        async with DifyAsyncHook() as hook:
            return await hook.run_workflow(inputs, user, poll_interval=0.05, **arguments)

    return asyncio.run(run())


@pytest.fixture(params=[on_a_worker, on_an_event_loop])
def run_workflow(request: pytest.FixtureRequest) -> RunWorkflow:
    run: RunWorkflow = request.param
    return run


@pytest.mark.usefixtures("dialect")
def test_a_run_is_started_followed_and_returned(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": {"answer": "二"}}))
    run = run_workflow({"query": "héllo"}, "me", workflow_id=UUID)
    assert (run.status, run.outputs) == ("succeeded", {"answer": "二"})
    (started,) = dify.started
    assert (run.id, started.user, started.inputs) == (started.workflow_run_id, "me", {"query": "héllo"})
    assert started.workflow_id == UUID


def test_a_run_that_failed_is_returned_too(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    dify.starts.append(Start("run_streaming_failed"))
    run = run_workflow({}, "me")
    assert run.status == "failed"
    assert run.error


@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_run_whose_events_break_off_is_polled(dify: DifyStandIn, run_workflow: RunWorkflow, then: str) -> None:
    dify.starts.append(Start(statuses=("running", "running", "succeeded"), cut="workflow_started", then=then))
    assert run_workflow({}, "me").status == "succeeded"
    assert len(dify.started) == 1


def test_a_start_whose_response_is_lost_is_found_in_the_log(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    dify.starts.append(Start(statuses=("succeeded",), fields={"inputs": {"query": "x"}}))
    dify.misbehave(lose_response(reset()), only="POST")
    assert run_workflow({"query": "x"}, "me").status == "succeeded"
    assert len(dify.started) == 1


def test_a_run_that_takes_too_long_is_left_alone(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    dify.starts.append(Start(statuses=("running",), cut="workflow_started", then="pings"))
    with pytest.raises(DifyWorkflowRunTimeout, match=r"The hook's timeout of 0\.5 seconds is over"):
        run_workflow({}, "me", timeout=0.5)
    assert dify.stopped == []


def test_a_run_that_stays_queued_is_uncertain(
    dify: DifyStandIn, run_workflow: RunWorkflow, caplog: pytest.LogCaptureFixture
) -> None:
    dify.starts.append(Start(cut=0, then="stall"))
    with pytest.raises(DifyWorkflowRunUncertain, match="'me' is still queued at Dify"):
        run_workflow({}, "me", timeout=2)
    gc.collect()
    # What a client says that was not closed.
    assert "Unclosed" not in caplog.text


@pytest.mark.parametrize("dialect", ["1.16.1"], indirect=True)
def test_that_a_run_is_not_in_the_log_yet_is_said_once_a_minute(
    dify: DifyStandIn, dialect: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    dify.slots = 0
    dify.silence_limit = 0.2
    with pytest.raises(DifyWorkflowRunUncertain):
        on_an_event_loop({}, "me", timeout=2)
    looks = [request for request in dify.requests if "/logs" in request.path]
    # The first look is the one before the start.
    assert len(looks) > 3
    (line,) = [record.getMessage() for record in caplog.records if "no run of user" in record.getMessage()]
    assert line.startswith("Dify's log has no run of user 'me' yet, ")


def test_a_run_that_another_process_started_is_waited_for(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running", None, "running", "succeeded", outputs={"a": 1})
    dify.misbehave(respond(503))
    with DifyHook() as hook:
        run = hook.wait_for_workflow_run(run_id.upper(), poll_interval=0.05)
        assert (run.status, run.outputs) == ("succeeded", {"a": 1})
        with pytest.raises(DifyConfigurationError, match="UUID"):
            hook.wait_for_workflow_run("none")


def test_a_wait_ends_at_its_timeout_or_when_dify_stays_away(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running")
    with DifyHook(retry_limit=0) as hook:
        with pytest.raises(DifyWorkflowRunTimeout, match="hook's timeout"):
            hook.wait_for_workflow_run(run_id, poll_interval=0.05, timeout=0.3)
        dify.misbehave(replay("detail_unknown_uuid"), times=3)
        dify.misbehave(*[respond(503)] * 6)
        with pytest.raises((DifyConnectionError, DifyWorkflowRunNotFound)):
            hook.wait_for_workflow_run(run_id, poll_interval=0.05)
