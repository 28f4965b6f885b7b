"""Whose word a response is: what stands in front of Dify responds in its place, and that ends no wait."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyError,
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.combinations import each_or_long, pairs
from tests.dify_stand_in import (
    GATEWAYS,
    DifyStandIn,
    Fault,
    Start,
    gateway,
    html,
    kong_404,
    rejects,
    replay,
    respond,
    too_many_requests,
    without_version,
)
from tests.unit.test_run_workflow import RunWorkflow, on_a_worker, on_an_event_loop
from tests.unit.test_running_task import task_of_try
from tests.unit.test_trigger import payload_of, trigger_of

UUID = "2d7a7544-770c-496f-8ef9-4e622682b330"
Ask = Callable[[Callable[[Any], Any]], Any]

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries", "quick_resumption", "short_grace")
EACH_GATEWAY = [pytest.param(fault, id=name) for name, fault in GATEWAYS.items()]


def with_the_hook(work: Callable[[DifyHook], Any]) -> Any:
    with DifyHook(retry_limit=0) as hook:
        return work(hook)


def with_the_async_hook(work: Callable[[DifyAsyncHook], Any]) -> Any:
    async def run() -> Any:
        async with DifyAsyncHook() as hook:
            return await work(hook)

    return asyncio.run(run())


BOTH_HOOKS = [with_the_hook, with_the_async_hook]
BOTH_WAYS = [on_a_worker, on_an_event_loop]


@pytest.fixture(params=BOTH_HOOKS)
def ask(request: pytest.FixtureRequest) -> Ask:
    return request.param


@pytest.fixture(params=BOTH_WAYS)
def run_workflow(request: pytest.FixtureRequest) -> RunWorkflow:
    return request.param


def posts(dify: DifyStandIn) -> int:
    return sum(request.method == "POST" and request.path.endswith("/run") for request in dify.requests)


# --- one response


@pytest.mark.parametrize(("fault", "ask"), pairs(EACH_GATEWAY, BOTH_HOOKS))
def test_a_rejection_that_is_not_difys_may_pass_and_says_who_responded(
    dify: DifyStandIn, ask: Ask, fault: Fault
) -> None:
    dify.misbehave(fault)
    with pytest.raises(DifyConnectionError, match="in front of Dify") as caught:
        ask(lambda hook: hook.get_workflow_run(UUID))
    assert type(caught.value) is DifyConnectionError
    assert caught.value.status_code in (400, 401, 403, 404)
    # What came, and from where: enough to find out what responded.
    assert f"{caught.value.status_code}" in str(caught.value)
    assert dify.origin in str(caught.value)


@pytest.mark.parametrize(
    ("work", "name"),
    pairs(
        [
            pytest.param(lambda hook: hook.get_app_info(), id="info"),
            pytest.param(lambda hook: hook.get_parameters(), id="parameters"),
            pytest.param(lambda hook: hook.list_workflow_runs(), id="logs"),
            pytest.param(lambda hook: hook.stop_workflow_task(UUID, "me"), id="stop"),
            pytest.param(lambda hook: hook.start_workflow_run({}, "me"), id="start"),
            pytest.param(lambda hook: hook.upload_file(__file__, "me"), id="upload"),
        ],
        ["kong-404", "cloudflare-403-page", "iap-401", "code-401"],
    ),
)
def test_that_is_so_for_every_request(dify: DifyStandIn, work: Callable[[DifyHook], Any], name: str) -> None:
    dify.misbehave_always(GATEWAYS[name])
    with pytest.raises(DifyConnectionError, match="in front of Dify") as caught:
        with_the_hook(work)
    assert ("no Route matched" in str(caught.value)) == (name == "kong-404")
    assert len(dify.requests) == 1
    assert dify.started == []


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (400, "not_workflow_app", DifyRequestError),
        (401, "unauthorized", DifyAuthenticationError),
        (403, "forbidden", DifyAuthenticationError),
        (404, "not_found", DifyWorkflowRunNotFound),
        # Without a body, but with the version.
        (401, "", DifyAuthenticationError),
        (403, "", DifyAuthenticationError),
    ],
)
def test_a_rejection_of_difys_is_its_word_with_its_version_or_its_three_fields(
    dify: DifyStandIn, ask: Ask, status: int, code: str, expected: type[DifyError]
) -> None:
    faults = [respond(status, "", headers={"X-Version": "1.16.1"})]
    if code:
        # Some proxies remove headers that they don't know.
        own = {"code": code, "message": "Dify says so", "status": status}
        faults = [rejects(status, code, "Dify says so"), gateway(status, own)]
    for fault in faults:
        dify.misbehave(fault)
        with pytest.raises(expected) as caught:
            ask(lambda hook: hook.get_workflow_run(UUID))
        assert type(caught.value) is expected
        assert "in front of" not in str(caught.value)


def test_a_page_of_difys_for_a_wrong_address_still_asks_for_the_base_url(dify: DifyStandIn, ask: Ask) -> None:
    dify.misbehave(replay("detail_no_v1_prefix"))
    with pytest.raises(DifyConnectionError, match="Check the host") as caught:
        ask(lambda hook: hook.get_workflow_run(UUID))
    assert "in front of" not in str(caught.value)


def test_a_proxy_that_removes_the_version_changes_nothing(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    dify.misbehave_always(without_version())
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": {"a": 1}}, cut="workflow_started"))
    assert run_workflow({}, "me", timeout=60).outputs == {"a": 1}


# --- waits


def between(dify: DifyStandIn, *faults: Fault, times: int = 1) -> None:
    """Let each of these faults come between two polls of runs that Dify responds to."""

    async def as_ever(request: Any) -> Any:
        return await dify.respond_to(request)

    for fault in faults:
        dify.misbehave(as_ever, *[fault] * times, only="GET .*/workflows/run/")


@pytest.mark.parametrize("waits", ["hook", "triggerer"])
def test_no_gateway_ends_a_wait(dify: DifyStandIn, waits: str) -> None:
    between(dify, *GATEWAYS.values())
    run_id = dify.add_run(*["running"] * (len(GATEWAYS) + 1), "succeeded", outputs={"a": 1})
    if waits == "triggerer":
        assert payload_of(trigger_of(run_id, poll_interval=0.02, max_consecutive_failures=1))["status"] == "succeeded"
        return
    with DifyHook(retry_limit=0) as hook:
        assert hook.wait_for_workflow_run(run_id, poll_interval=0.02, timeout=60).outputs == {"a": 1}


def test_no_gateway_ends_a_run_that_the_hook_follows(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    between(dify, *GATEWAYS.values())
    statuses = (*["running"] * (len(GATEWAYS) + 1), "succeeded")
    dify.starts.append(Start(statuses=statuses, fields={"outputs": {"a": 1}}, cut="workflow_started"))
    assert run_workflow({}, "me", timeout=60).outputs == {"a": 1}
    assert (posts(dify), dify.stopped) == (1, [])


@pytest.mark.parametrize("fault", each_or_long(GATEWAYS, short=("kong-404", "iap-401", "cloudflare-403-text")))
def test_gateways_in_a_row_count_as_failed_polls(
    dify: DifyStandIn, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    dify.misbehave_always(GATEWAYS[fault])
    payload = payload_of(trigger_of(UUID, max_consecutive_failures=2, not_found_grace=60.0))
    assert len(dify.requests) == 3
    error = DifyError.from_event(payload["error"])
    assert type(error) is DifyConnectionError
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 2
    assert all("in a row of at most 2" in line and "in front of Dify" in line for line in warnings)


# --- starts


TURNED_AWAY = [
    *EACH_GATEWAY,
    pytest.param(html(300), id="300"),
    pytest.param(too_many_requests(), id="429"),
    pytest.param(replay("run_rate_limited_streaming"), id="400-too-many-requests"),
]


@pytest.mark.parametrize(("fault", "run_workflow"), pairs(TURNED_AWAY, BOTH_WAYS))
def test_a_start_that_a_gateway_turned_away_started_nothing_and_is_sent_again(
    dify: DifyStandIn, run_workflow: RunWorkflow, fault: Fault
) -> None:
    dify.misbehave(fault, times=2, only="POST")
    assert run_workflow({}, "me", timeout=60).status == "succeeded"
    assert (posts(dify), len(dify.started)) == (3, 1)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (rejects(400, "invalid_param", "query is required in input form"), DifyInputsRejected),
        (rejects(400, "invalid_param", "Workflow not published"), DifyRequestError),
        (rejects(401, "unauthorized", "Access token is invalid"), DifyAuthenticationError),
        # Of a gateway: it is too large.
        (gateway(413, "<title>413 Request Entity Too Large</title>"), DifyRequestError),
        (gateway(413, {"message": "Request size exceeded"}), DifyRequestError),
    ],
    ids=["inputs", "unpublished", "key", "size-page", "size-json"],
)
def test_a_start_that_dify_rejects_is_not_sent_again(
    dify: DifyStandIn, run_workflow: RunWorkflow, fault: Fault, expected: type[DifyError]
) -> None:
    dify.misbehave_always(fault, only="POST")
    with pytest.raises(expected) as caught:
        run_workflow({}, "me", timeout=60)
    assert type(caught.value) is expected
    assert ("in front of Dify" in str(caught.value)) == (caught.value.status_code == 413)
    assert posts(dify) == 1


def test_a_gateway_that_limits_requests_is_waited_for(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    limits = gateway(429, {"message": "API rate limit exceeded"})
    dify.misbehave(too_many_requests(), limits, limits, limits, limits, limits, only="POST")
    assert run_workflow({}, "me", timeout=60).status == "succeeded"
    assert len(dify.started) == 1


# --- runs that Dify says it does not know

ONCE = ("running", None, "running", None, "running", "succeeded")
DIALECTS_THAT_KNOW = pytest.mark.parametrize("dialect", ["1.12.1", "1.16.1"], indirect=True)


@DIALECTS_THAT_KNOW
def test_one_not_found_between_polls_does_not_make_a_run_unknown(dify: DifyStandIn, dialect: str) -> None:
    run_id = dify.add_run(*ONCE)
    assert payload_of(trigger_of(run_id))["status"] == "succeeded"
    waited_for = dify.add_run(*ONCE, outputs={"a": 1})
    with DifyHook() as hook:
        assert hook.wait_for_workflow_run(waited_for, poll_interval=0.02, timeout=60).outputs == {"a": 1}


@DIALECTS_THAT_KNOW
def test_one_not_found_does_not_make_a_followed_run_unknown(
    dify: DifyStandIn, dialect: str, run_workflow: RunWorkflow
) -> None:
    # Longer than the grace before the first of them.
    statuses = (*["running"] * 20, *ONCE)
    dify.starts.append(Start(statuses=statuses, fields={"outputs": {"a": 1}}, cut="workflow_started"))
    assert run_workflow({}, "me", timeout=60).outputs == {"a": 1}


@DIALECTS_THAT_KNOW
def test_two_in_a_row_do(dify: DifyStandIn, dialect: str) -> None:
    run_id = dify.add_run("running", "running", None)
    payload = payload_of(trigger_of(run_id))
    assert payload["error"]["type"] == "DifyWorkflowRunNotFound"
    assert len(dify.runs[run_id].polls) == 4
    # A poll apart.
    assert dify.runs[run_id].polls[3] - dify.runs[run_id].polls[2] > 0.03
    gone = dify.add_run(*["running"] * 20, None)
    with DifyHook() as hook, pytest.raises(DifyWorkflowRunNotFound):
        hook.wait_for_workflow_run(gone, poll_interval=0.02, timeout=60)


def test_a_run_that_was_never_seen_is_unknown_at_the_first_look_as_before(dify: DifyStandIn) -> None:
    payload = payload_of(trigger_of(dify.add_run(None)))
    assert payload["error"]["type"] == "DifyWorkflowRunNotFound"
    assert len(dify.requests) == 1


# --- retries


def first_try(dify: DifyStandIn, has_memory: bool) -> Any:
    """Start a run that goes on, in the first try of a task."""
    dify.starts.append(Start(statuses=("running",), cut="workflow_started"))
    with task_of_try(1, has_memory=has_memory) as first:
        first.execute()
    return first


MEMORY = pytest.mark.parametrize("has_memory", [True, False], ids=["memory", "log"])
LOOKS = [pytest.param("GET .*/workflows/run/", id="run"), pytest.param("GET .*/logs", id="log")]


@MEMORY
@pytest.mark.parametrize(("name", "where"), pairs(["kong-404", "envoy-404", "cloudflare-403-page", "iap-401"], LOOKS))
def test_a_gateway_that_responds_to_a_retrys_look_starts_no_second_run(
    dify: DifyStandIn, has_memory: bool, where: str, name: str
) -> None:
    first = first_try(dify, has_memory)
    dify.misbehave(GATEWAYS[name], times=2, only=where)
    with task_of_try(2, after=first) as second:
        assert second.execute() == dify.started[0].workflow_run_id
    assert (posts(dify), dify.stopped) == (1, [])


@MEMORY
def test_a_gateway_that_stays_ends_the_retry_without_a_second_run(dify: DifyStandIn, has_memory: bool) -> None:
    first = first_try(dify, has_memory)
    dify.misbehave_always(kong_404(), only="GET .*/workflows/run/")
    with task_of_try(2, after=first) as second, pytest.raises(DifyConnectionError, match="in front of Dify"):
        second.execute()
    assert posts(dify) == 1


@MEMORY
@pytest.mark.parametrize(("unknown", "runs"), [(1, 1), (5, 2)])
def test_a_retry_gives_an_earlier_run_up_when_dify_says_twice_that_it_is_unknown(
    dify: DifyStandIn, has_memory: bool, unknown: int, runs: int
) -> None:
    first = first_try(dify, has_memory)
    dify.misbehave(*[replay("detail_unknown_uuid", "1.16.1")] * unknown, only="GET .*/workflows/run/")
    with task_of_try(2, after=first) as second:
        assert second.execute() == dify.started[-1].workflow_run_id
    assert len(dify.started) == runs
