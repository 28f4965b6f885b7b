"""The wait on the triggerer, on an event loop of the test's own, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import random
import re
import time
import uuid
import warnings
from collections.abc import Callable, Coroutine, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER, CAN_START_FROM_TRIGGER
from airflow_provider_dify.api.client import SharedSession
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.runs.log import RunSearch, delay_after, fingerprint
from airflow_provider_dify.runs.waiting import TriggerWait
from airflow_provider_dify.runs.wanted import LatestRunSearch
from airflow_provider_dify.tasks.xcoms import RUN_LOG, TriggerXComs
from airflow_provider_dify.triggers.dify import DifyLatestWorkflowRunTrigger, DifyWorkflowRunTrigger
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    html,
    redirect,
    reset,
    respond,
    stall,
    too_many_requests,
    truncate_body,
)

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_resumption", "quick_retries")


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run on a loop of its own, and find nothing left on it afterwards."""

    async def and_look() -> Any:
        result = await work
        await asyncio.sleep(0.05)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, left
        assert not SharedSession.on_loops.get(asyncio.get_running_loop())
        return result

    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        result = asyncio.run(and_look())
        gc.collect()
    return result


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds, however busy this machine is."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def events_of(trigger: DifyWorkflowRunTrigger) -> list[Any]:
    return [event async for event in trigger.run()]


def payload_of(trigger: DifyWorkflowRunTrigger) -> dict[str, Any]:
    (event,) = run(events_of(trigger))
    assert json.loads(json.dumps(event.payload)) == event.payload
    return event.payload


def trigger_of(run_id: str | None, **arguments: Any) -> DifyWorkflowRunTrigger:
    trigger = DifyWorkflowRunTrigger(run_id, **{"poll_interval": 0.05, **arguments})
    # The triggerer's own logger goes past pytest on Airflow 3.
    trigger._log = logging.getLogger("wait")
    return trigger


def test_the_event_is_small_and_holds_no_outputs(dify: DifyStandIn, dialect: str) -> None:
    fields = {"outputs": {"secret": "not for the event"}, "elapsed_time": 0.068595, "total_steps": 2}
    run_id = dify.add_run("running", "running", "succeeded", **fields)
    payload = payload_of(trigger_of(run_id))
    assert payload == {
        "workflow_run_id": run_id,
        "status": "succeeded",
        "end": "run_is_over",
        "message": f"Dify workflow run {run_id} succeeded after 0.1 seconds and 2 steps.",
        "error": None,
    }


@pytest.mark.parametrize(
    ("statuses", "arguments", "end", "message"),
    [
        (["running", "failed"], {}, "run_is_over", "Connection refused.*failed"),
        (["stopped"], {}, "run_is_over", "was stopped"),
        (["partial-succeeded"], {"fail_on_partial_success": True}, "run_is_over", "fail_on_partial_success"),
        (["running"], {"run_timeout": 60.0}, "run_is_over", "orphaned"),
        ([None], {}, "failed", "not know workflow run"),
        ([None], {"not_found_grace": 0.2}, "failed", "still unknown"),
        ([None], {"not_found_grace": 60.0, "first_poll": time.time() - 61}, "failed", "still unknown"),
        (["paused"], {"deadline": time.time()}, "timed_out", "last status was paused, seen since 20"),
    ],
)
def test_every_ending_is_one_event(
    dify: DifyStandIn, dialect: str, statuses: list[str | None], arguments: dict[str, Any], end: str, message: str
) -> None:
    run_id = dify.add_run(*statuses, **({"created_at": 1_700_000_000} if "run_timeout" in arguments else {}))
    payload = payload_of(trigger_of(run_id, **arguments))
    assert payload["end"] == end
    assert run_id in payload["message"]
    assert (payload["error"] is not None) == (end == "failed")
    if payload["error"] and dialect == "1.13.0":
        # It can't say that it knows no such run. Its 500 may pass, and is survived a few times.
        assert payload["error"]["type"] == "DifyConnectionError"
        return
    assert re.search(message, payload["message"])
    if payload["error"]:
        assert payload["error"]["type"] == "DifyWorkflowRunNotFound"


@pytest.mark.parametrize("wrong", ["", "None", "../info"])
def test_a_wrong_id_is_one_event_and_no_request(dify: DifyStandIn, wrong: str) -> None:
    payload = payload_of(trigger_of(wrong))
    assert payload["error"]["type"] == "DifyConfigurationError"
    assert dify.requests == []


def test_an_unexpected_exception_is_one_event_too() -> None:
    payload = payload_of(trigger_of(str(uuid.uuid4()), dify_conn_id="no_such_connection"))
    assert payload["error"]["type"] == "DifyError"
    assert "no_such_connection" in payload["message"]


def test_a_worker_ends_the_task_where_the_triggerer_cannot_push_its_outputs(dify: DifyStandIn) -> None:
    # Outside a triggerer there is nothing to push through.
    trigger = trigger_of(dify.add_run("succeeded"), end_from_trigger=True)
    assert payload_of(trigger)["end"] == "run_is_over"


@pytest.mark.skipif(not CAN_END_FROM_TRIGGER, reason="this Airflow cannot end a task from its trigger")
def test_only_a_success_ends_the_task_from_the_trigger(dify: DifyStandIn) -> None:
    arguments: dict[str, Any] = {"end_from_trigger": True, "do_xcom_push": False}
    (event,) = run(events_of(trigger_of(dify.add_run("succeeded"), **arguments)))
    assert type(event).__name__ == "TaskSuccessEvent"
    assert payload_of(trigger_of(dify.add_run("failed"), **arguments))["end"] == "run_is_over"


@pytest.mark.skipif(not CAN_END_FROM_TRIGGER, reason="this Airflow's triggerer cannot push XComs")
@pytest.mark.parametrize("has_link", [False, True])
def test_the_link_is_pushed_once_unless_a_worker_has_pushed_it(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, has_link: bool
) -> None:
    pushed: list[str] = []

    async def push(self: Any, xcoms: dict[str, Any], run_id: str) -> bool:
        pushed.extend(xcoms)
        return True

    monkeypatch.setattr(TriggerXComs, "_push", push)
    trigger = trigger_of(dify.add_run("running", "running", "succeeded"), poll_interval=0.05, has_link=has_link)
    trigger.task_instance = SimpleNamespace(task_id="wait", task=None)
    assert payload_of(trigger)["end"] == "run_is_over"
    assert pushed == ([] if has_link else [RUN_LOG])


@pytest.mark.parametrize("status", ["succeeded", "failed", None])
def test_a_task_resumes_only_when_airflow_has_seen_the_end_of_its_worker(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, status: str | None
) -> None:
    monkeypatch.setattr(DifyWorkflowRunTrigger, "resume_delay", 0.5)
    run_id = dify.add_run(status) if status else str(uuid.uuid4())
    began = time.monotonic()
    payload_of(trigger_of(run_id))
    assert time.monotonic() - began >= 0.5


@pytest.mark.skipif(not CAN_END_FROM_TRIGGER, reason="this Airflow's triggerer cannot end tasks")
def test_a_task_that_ends_on_the_triggerer_ends_at_once(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DifyWorkflowRunTrigger, "resume_delay", 300.0)
    began = time.monotonic()
    run(events_of(trigger_of(dify.add_run("succeeded"), end_from_trigger=True, do_xcom_push=False)))
    assert time.monotonic() - began < 60


# --- serialization


def test_a_trigger_is_rebuilt_from_its_serialized_form() -> None:
    trigger = DifyWorkflowRunTrigger(
        "r",
        "c",
        poll_interval=1.5,
        deadline=2.5,
        first_poll=3.5,
        fail_on_partial_success=True,
        not_found_grace=4.5,
        run_timeout=5.5,
        max_consecutive_failures=None,
        exponential_backoff=True,
        max_wait=6.5,
        end_from_trigger=True,
        do_xcom_push=False,
        has_link=True,
        multiple_outputs=False,
        stop_task_id="t",
        stop_user="u",
    )
    path, arguments = trigger.serialize()
    module, _, name = path.rpartition(".")
    assert getattr(__import__(module, fromlist=[name]), name) is DifyWorkflowRunTrigger
    assert DifyWorkflowRunTrigger(**json.loads(json.dumps(arguments))).serialize() == (path, arguments)
    assert {type(value) for value in arguments.values()} <= {str, int, float, bool, type(None)}


def test_an_older_form_still_loads() -> None:
    old = {"workflow_run_id": "r", "dify_conn_id": "c"}
    assert DifyWorkflowRunTrigger(**old).serialize()[1] == {**DifyWorkflowRunTrigger("r").serialize()[1], **old}


def test_no_secret_is_in_its_serialized_form_or_attributes(dify: DifyStandIn) -> None:
    trigger = trigger_of(dify.add_run("succeeded"))
    payload_of(trigger)
    assert API_KEY not in repr(trigger.serialize())
    assert API_KEY not in repr(vars(trigger))


# --- connections


def test_many_waits_share_a_few_connections(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_dify.api.client.MAX_REQUESTS_AT_ONCE", 5)
    runs = [dify.add_run("running", "running", "succeeded") for _ in range(50)]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*(events_of(trigger_of(run_id)) for run_id in runs))

    for (event,) in run(all_of_them()):
        assert event.payload["status"] == "succeeded"
    assert len(dify.requests) == 50 * 3
    assert dify.connections_opened <= 5


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """When each poll of a wait is due, in seconds from now; none is waited for."""
    seconds: list[float] = []

    async def sleep_until(self: DifyWorkflowRunTrigger, due: float, deadline: float | None) -> None:
        # What is due at once is the end of the task, after the last poll.
        if (left := due - asyncio.get_running_loop().time()) > 0:
            seconds.append(left)

    monkeypatch.setattr(DifyWorkflowRunTrigger, "_sleep_until", sleep_until)
    return seconds


def test_polls_of_waits_that_start_together_are_spread(dify: DifyStandIn, pauses: list[float]) -> None:
    runs = [dify.add_run("succeeded") for _ in range(100)]

    async def all_of_them() -> None:
        await asyncio.gather(*(events_of(trigger_of(run_id, poll_interval=3_600.0)) for run_id in runs))

    run(all_of_them())
    assert 1_000 < sorted(pauses)[50] < 2_600
    assert max(pauses) > 3_000


def test_slow_responses_do_not_delay_the_next_poll(dify: DifyStandIn, pauses: list[float]) -> None:
    run_id = dify.add_run(*["running"] * 3, "succeeded")

    async def late(request: Any) -> Any:
        await asyncio.sleep(0.3)
        return await dify.respond_to(request)

    dify.misbehave_always(late)
    payload_of(trigger_of(run_id, poll_interval=3_600.0))
    # Each poll is due an interval after the one before was due, however long a response takes.
    assert [round((after - before) / 60) for before, after in itertools.pairwise(pauses)] == [60, 60, 60]


def test_a_kept_alive_connection_that_the_server_closed_is_no_failed_poll(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    run_id = dify.add_run(*["running"] * 4, "succeeded")
    dify.misbehave(*[close_after(dify)] * 4)
    payload_of(trigger_of(run_id, max_consecutive_failures=0))
    assert "failed" not in caplog.text


@pytest.mark.parametrize(("keepalive", "is_kept"), [(0.05, False), (60, True)])
def test_a_connection_is_kept_for_as_long_as_is_said(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, keepalive: float, is_kept: bool
) -> None:
    monkeypatch.setattr("airflow_provider_dify.api.client.KEEPALIVE_SECONDS", keepalive)
    payload_of(trigger_of(dify.add_run("running", "running", "succeeded"), poll_interval=0.25))
    assert (len({request.connection for request in dify.requests}) == 1) == is_kept


def close_after(dify: DifyStandIn) -> Any:
    async def fault(request: Any) -> Any:
        response = await dify.respond_to(request)
        await response.prepare(request)
        await response.write_eof()
        request.transport.close()
        return response

    return fault


def test_a_second_event_loop_has_its_own_session(dify: DifyStandIn) -> None:
    import threading

    run_ids = [dify.add_run("running", "running", "succeeded") for _ in range(2)]
    payloads: list[Any] = []
    threads = [threading.Thread(target=lambda i=i: payloads.append(payload_of(trigger_of(i)))) for i in run_ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [payload["status"] for payload in payloads] == ["succeeded"] * 2


def test_the_session_lives_as_long_as_someone_uses_it(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running")

    async def work() -> None:
        loop = asyncio.get_running_loop()
        async with DifyAsyncHook() as first:
            await first.get_workflow_run(run_id)
            async with DifyAsyncHook() as second:
                await second.get_workflow_run(run_id)
                assert len(SharedSession.on_loops[loop]) == 1
            await first.get_workflow_run(run_id)
        assert not SharedSession.on_loops[loop]

    run(work())
    assert dify.connections_opened == 1


# --- trouble


@pytest.mark.parametrize(
    "fault",
    [
        lambda: respond(500),
        lambda: respond(503, "<html>"),
        lambda: html(),
        lambda: too_many_requests(),
        lambda: truncate_body(reset=True),
        lambda: truncate_body(reset=False),
        lambda: stall(3),
        lambda: redirect("https://login.example.com/"),
    ],
)
def test_each_temporary_failure_is_retried_with_a_warning(
    dify: DifyStandIn, connection_with: Callable[..., None], caplog: pytest.LogCaptureFixture, fault: Callable[[], Any]
) -> None:
    connection_with(timeout=0.2)
    run_id = dify.add_run("succeeded")
    dify.misbehave(fault(), times=3)
    assert payload_of(trigger_of(run_id, max_consecutive_failures=3))["status"] == "succeeded"
    assert len([r for r in caplog.records if r.levelno == logging.WARNING and run_id in r.getMessage()]) == 3


@pytest.fixture
def connection_with(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Set these extras on the connection."""

    def make(**extra: Any) -> None:
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": extra}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))

    return make


def test_one_failed_poll_too_many_ends_the_wait_with_the_reason(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running")
    dify.misbehave_always(respond(503, json.dumps({"code": "unavailable", "message": "busy"})))
    payload = payload_of(trigger_of(run_id, max_consecutive_failures=2))
    assert len(dify.requests) == 3
    error = DifyError.from_event(payload["error"])
    assert type(error) is DifyConnectionError
    assert (error.status_code, error.code, error.message) == (503, "unavailable", "busy")
    assert "busy" in payload["message"]


def every_second(fault: Any, dify: DifyStandIn) -> Any:
    numbers = itertools.count()

    async def sometimes(request: Any) -> Any:
        return await (dify.respond_to if next(numbers) % 2 else fault)(request)

    return sometimes


def test_failed_polls_that_do_not_follow_each_other_never_add_up(dify: DifyStandIn) -> None:
    dify.misbehave_always(every_second(respond(503), dify))
    run_id = dify.add_run(*["running"] * 4, "succeeded")
    assert payload_of(trigger_of(run_id, max_consecutive_failures=1))["status"] == "succeeded"
    assert len(dify.requests) == 10


@pytest.mark.usefixtures("full_server")
def test_a_server_that_takes_no_connection_is_given_up_before_the_timeout_of_a_response() -> None:
    began = time.monotonic()
    payload = payload_of(trigger_of(str(uuid.uuid4()), max_consecutive_failures=0))
    assert payload["error"]["type"] == "DifyConnectionError"
    assert 0.3 <= time.monotonic() - began < 20


def test_a_wait_that_is_cancelled_while_it_closes_the_session_leaves_no_socket_open(dify: DifyStandIn) -> None:
    class SlowToClose:
        closed = asyncio.Event()

        async def close(self) -> None:
            await asyncio.sleep(0.05)
            self.closed.set()

    async def work() -> None:
        connection = DifyConnection("dify_default", dify.base_url, API_KEY)
        shared = SharedSession.join(connection)
        shared.client = client = SlowToClose()  # type: ignore[assignment]
        leaving = asyncio.create_task(shared.leave())
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await asyncio.wait_for(client.closed.wait(), 5)

    run(work())


def test_a_refused_connection_is_retried(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running", "running", "succeeded")

    async def work() -> Any:
        wait = asyncio.create_task(events_of(trigger_of(run_id, poll_interval=0.2, max_consecutive_failures=None)))
        await asyncio.sleep(0.3)
        refusing = dify.refusing_connections()
        await asyncio.to_thread(refusing.__enter__)
        await asyncio.sleep(0.5)
        await asyncio.to_thread(refusing.__exit__, None, None, None)
        return await wait

    (event,) = run(work())
    assert event.payload["status"] == "succeeded"


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_honoured(dify: DifyStandIn, as_date: bool, pauses: list[float]) -> None:
    from tests.dify_stand_in import retry_after_date

    until = datetime.now(timezone.utc) + timedelta(seconds=300)
    dify.misbehave(too_many_requests(retry_after_date(until) if as_date else "300"))
    payload_of(trigger_of(dify.add_run("succeeded")))
    # A date has no fractions, and this machine may be slow.
    assert 240 < pauses[1] <= 301


def test_no_delay_after_a_failure_is_without_bounds_but_what_the_server_asks_for_is_not_cut_short() -> None:
    assert delay_after(DifyConnectionError(""), 10_000, 1.0) == 60
    assert delay_after(DifyConnectionError("", retry_after=86_400), 1, 1.0) == 86_400


def test_backoff_and_its_limit_are_honoured(dify: DifyStandIn, pauses: list[float]) -> None:
    run_id = dify.add_run(*["running"] * 6, "succeeded")
    payload_of(trigger_of(run_id, poll_interval=1_000.0, exponential_backoff=True, max_wait=5_000.0))
    intervals = [after - before for before, after in itertools.pairwise(pauses)]
    # A busy machine takes some seconds away from each.
    bounds = [(500, 1_000), (1_000, 2_000), (2_000, 4_000), (4_000, 5_000), (5_000, 5_000), (5_000, 5_000)]
    assert len(intervals) == len(bounds)
    assert all(low - 60 < interval <= high for interval, (low, high) in zip(intervals, bounds, strict=True))


def test_backoff_never_overflows() -> None:
    assert TriggerWait(poll_interval=10, exponential_backoff=True, max_wait=300).interval_after(100_000) == 300


def test_a_key_that_was_rotated_is_read_again(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    run_id = dify.add_run("running", "running", "succeeded")

    async def rotate(request: Any) -> Any:
        dify.api_keys = {"the-next-key"}
        connection = {"conn_type": "dify", "host": dify.base_url, "password": "the-next-key"}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
        return await dify.respond_to(request)

    dify.misbehave(rotate)
    assert payload_of(trigger_of(run_id))["status"] == "succeeded"
    keys = [request.headers["Authorization"] for request in dify.requests]
    assert keys == [f"Bearer {API_KEY}", *["Bearer the-next-key"] * 3]


def test_the_key_follows_no_redirect_elsewhere(dify: DifyStandIn) -> None:
    with DifyStandIn() as other:
        dify.misbehave_always(redirect(f"{other.base_url}/info"))
        payload = payload_of(trigger_of(dify.add_run("running"), max_consecutive_failures=0))
        assert f"redirect to {other.base_url}" in payload["message"]
        assert other.requests == []


def test_no_cookie_is_kept_and_no_netrc_read(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine localhost login me password from-netrc\n")
    monkeypatch.setenv("NETRC", str(netrc))
    # By its name: from a bare address some clients keep no cookie anyway.
    connection = {"conn_type": "dify", "host": f"http://localhost:{dify.port}/v1", "password": API_KEY}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
    dify.misbehave(respond(503, headers={"Set-Cookie": "session=1; Path=/"}))
    payload_of(trigger_of(dify.add_run("succeeded")))
    assert "Cookie" not in dify.requests[1].headers
    assert {request.headers["Authorization"] for request in dify.requests} == {f"Bearer {API_KEY}"}


def test_a_killed_wait_stops_the_run_that_its_operator_started(dify: DifyStandIn) -> None:
    task_id = str(uuid.uuid4())
    run(trigger_of(dify.add_run("running"), stop_task_id=task_id, stop_user="airflow").on_kill())
    assert dify.stopped == [(task_id, "airflow")]


@pytest.mark.parametrize(
    ("dialect", "said"),
    [("1.14.2", "can stay running for ever"), ("1.16.1", "its record does not show it yet")],
    indirect=["dialect"],
)
def test_a_killed_wait_says_what_the_record_of_its_run_will_show(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, dialect: str, said: str
) -> None:
    caplog.set_level(logging.INFO, "wait")
    # No run of this task is there, so that none ends.
    run(trigger_of(dify.add_run("running"), stop_task_id=str(uuid.uuid4()), stop_user="airflow").on_kill())
    assert said in caplog.text


async def kill_as_airflow_does(trigger: DifyWorkflowRunTrigger, every: float = 0.2) -> None:
    """Call ``on_kill``, and cancel it again and again, as Airflow 3.3 does each second until the trigger has ended."""
    killing = asyncio.create_task(asyncio.wait_for(trigger.on_kill(), 30))
    while not killing.done():
        await asyncio.wait([killing], timeout=every)
        killing.cancel("user-action")
    with contextlib.suppress(asyncio.CancelledError):
        await killing
    # Before Python 3.12 wait_for ends at the second of these, and leaves on_kill to go on.
    while others := asyncio.all_tasks() - {asyncio.current_task()}:
        await asyncio.wait(others)


def test_a_killed_wait_stops_the_run_although_airflow_cancels_it_meanwhile(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wait")
    run_id, task_id = dify.add_run("running"), str(uuid.uuid4())
    dify.misbehave(stall(0.5), only="/stop")
    run(kill_as_airflow_does(trigger_of(run_id, stop_task_id=task_id, stop_user="airflow")))
    assert dify.stopped == [(task_id, "airflow")]
    (said,) = [
        record for record in caplog.records if f"Asked Dify to stop workflow run {run_id}" in record.getMessage()
    ]
    assert said.levelname == "INFO"


def test_a_killed_wait_whose_time_is_over_says_that_the_run_goes_on(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AIRFLOW__TRIGGERER__ON_KILL_TIMEOUT", "1")
    run_id = dify.add_run("running")
    dify.misbehave_always(stall(5), only="/stop")
    run(trigger_of(run_id, stop_task_id="t", stop_user="airflow").on_kill())
    assert f"Workflow run {run_id} may keep running: [triggerer] on_kill_timeout of 1 seconds is over" in caplog.text


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="before Airflow 3.3 no trigger is killed")
def test_a_killed_wait_stops_its_run_where_airflow_does_not_say_who_waits(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trigger = trigger_of(dify.add_run("running"), stop_task_id="77b720b7-eaf5-4cfd-95ab-a25d6b783f74", stop_user="us")
    monkeypatch.setattr("airflow_provider_dify.triggers.dify.KILLS_WHAT_IT_HANDS_OVER", True)
    # There is no Airflow to ask here.
    trigger.task_instance = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, task=None)
    run(trigger.on_kill())
    assert dify.stopped == [("77b720b7-eaf5-4cfd-95ab-a25d6b783f74", "us")]
    (warning,) = [record for record in caplog.records if record.levelname == "WARNING"]
    assert warning.getMessage() == "Airflow did not say whether the task still waits; its run is stopped."
    assert warning.exc_info


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="before Airflow 3.3 no trigger is killed")
def test_airflow_3_4_is_not_asked_whether_another_triggerer_waits(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("airflow_provider_dify.triggers.dify.KILLS_WHAT_IT_HANDS_OVER", False)
    trigger = trigger_of(dify.add_run("running"), stop_task_id="77b720b7-eaf5-4cfd-95ab-a25d6b783f74", stop_user="us")
    trigger.task_instance = SimpleNamespace(dag_id="d", task_id="t", run_id="r", map_index=-1, task=None)
    run(trigger.on_kill())
    assert len(dify.stopped) == 1
    assert "Airflow did not say" not in caplog.text


def test_a_killed_wait_of_a_sensor_stops_nothing(dify: DifyStandIn) -> None:
    run(trigger_of(dify.add_run("running")).on_kill())
    assert dify.requests == []


@pytest.fixture
def tokyo() -> Iterator[None]:
    """Let the process live in another time zone than UTC."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="no task starts on the triggerer before Airflow 3.3")
@pytest.mark.parametrize(
    ("limit", "execution_timeout", "margin"),
    [
        (None, None, 120),
        (None, timedelta(hours=1), 120),
        (timedelta(hours=1), None, 120),
        # Airflow's limit is the shorter one.
        (timedelta(hours=1), timedelta(hours=2), 120),
        (timedelta(hours=1), timedelta(hours=1), 120),
        (timedelta(hours=1), timedelta(minutes=59), 60),
        (timedelta(hours=1), timedelta(minutes=50), 0),
    ],
)
@pytest.mark.parametrize("zone", [timezone.utc, timezone(timedelta(hours=5)), None])
def test_a_wait_that_started_on_the_triggerer_ends_before_airflows_limit(
    tokyo: None, limit: timedelta | None, execution_timeout: timedelta | None, margin: float, zone: timezone | None
) -> None:
    # What the triggerer sets, from what the task and its sensor say; it has no zone in the database's own time, which
    # is UTC wherever the triggerer runs.
    trigger = trigger_of(str(uuid.uuid4()))
    task = SimpleNamespace(
        start_trigger_args=SimpleNamespace(timeout=limit, trigger_kwargs={}),
        execution_timeout=execution_timeout,
        template_ext=(),
        template_fields=(),
    )
    trigger.task_instance = SimpleNamespace(task_id="wait", task=task)
    assert trigger._deadline() is None
    trigger.timeout_after = datetime.fromtimestamp(100_000, zone or timezone.utc)
    if zone is None:
        trigger.timeout_after = trigger.timeout_after.replace(tzinfo=None)
    assert trigger._deadline() == 100_000 - margin
    # What the task itself said on a worker comes first.
    ours = trigger_of(str(uuid.uuid4()), deadline=5.0)
    ours.timeout_after = trigger.timeout_after
    assert ours._deadline() == 5.0


@pytest.mark.parametrize("kind", [DifyWorkflowRunTrigger, DifyLatestWorkflowRunTrigger])
def test_a_trigger_that_another_version_stored_goes_on(dify: DifyStandIn, kind: type[DifyWorkflowRunTrigger]) -> None:
    run_id = dify.add_run("succeeded", user="us", created_at=int(time.time()))
    is_latest = kind is DifyLatestWorkflowRunTrigger
    search = {"created_after": time.time() - 60} if is_latest else RunSearch("us", time.time(), True).serialize()
    stored = {"search": {**search, "of_a_later_version": [1]}, "of_a_later_version": True}
    payload = payload_of(kind(None, poll_interval=0.05, **stored))
    assert (payload["workflow_run_id"], payload["end"]) == (run_id, "run_is_over")


@pytest.mark.parametrize("kind", [DifyWorkflowRunTrigger, DifyLatestWorkflowRunTrigger])
def test_a_run_that_a_search_has_found_is_polled_at_once(dify: DifyStandIn, kind: type[DifyWorkflowRunTrigger]) -> None:
    run_id = dify.add_run("succeeded", user="us", created_at=int(time.time()))
    is_latest = kind is DifyLatestWorkflowRunTrigger
    search = LatestRunSearch(time.time() - 60) if is_latest else RunSearch("us", time.time(), True)
    began = time.monotonic()
    payload = payload_of(kind(None, search=search.serialize(), poll_interval=3_600.0, deadline=time.time() + 600))
    assert (payload["workflow_run_id"], payload["end"]) == (run_id, "run_is_over")
    assert time.monotonic() - began < 60


def test_the_last_poll_is_at_the_deadline(dify: DifyStandIn) -> None:
    run_id = dify.add_run("running")
    deadline = time.time() + 1
    payload = payload_of(trigger_of(run_id, poll_interval=3_600.0, deadline=deadline))
    assert (payload["end"], payload["status"]) == ("timed_out", "running")
    assert deadline - 0.05 <= time.time() < deadline + 60
    # The first one may have been just before, by chance, or late on a busy machine.
    assert len(dify.runs[run_id].polls) in (1, 2)


def test_the_last_look_for_a_queued_run_is_at_the_deadline(dify: DifyStandIn) -> None:
    deadline = time.time() + 1
    search = RunSearch("us", time.time(), True).serialize()
    payload = payload_of(trigger_of(None, search=search, poll_interval=3_600.0, deadline=deadline))
    assert deadline - 0.05 <= time.time() < deadline + 60
    assert len(dify.requests) == 2
    assert (payload["workflow_run_id"], payload["end"]) == (None, "failed")
    error = DifyError.from_event(payload["error"])
    assert type(error) is DifyWorkflowRunUncertain
    assert error.user == "us"
    assert "Dify's log shows no run of user 'us': it may still be queued" in str(error)


def test_that_a_run_is_still_queued_is_said_once_a_minute(dify: DifyStandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "wait")
    search = RunSearch("us", time.time(), True).serialize()
    payload_of(trigger_of(None, search=search, deadline=time.time() + 1))
    assert len(dify.requests) > 2
    lines = [record.getMessage() for record in caplog.records if record.name == "wait"]
    assert lines == [
        "The workflow run of user 'us' is queued at Dify, or not in its log yet; 0 seconds in the triggerer."
    ]


def test_a_run_that_was_found_in_the_log_is_named_in_log_and_event(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "wait")
    run_id = dify.add_run("running", "succeeded", user="us")
    payload = payload_of(trigger_of(None, search=RunSearch("us", time.time(), True).serialize()))
    assert (payload["workflow_run_id"], payload["status"]) == (run_id, "succeeded")
    lines = [record.getMessage() for record in caplog.records if record.name == "wait"]
    assert lines[0] == f"Dify's log names the run: workflow run {run_id}."


def test_a_run_of_another_task_is_asked_for_its_inputs_once(dify: DifyStandIn) -> None:
    # They share a user, so the inputs have to tell their runs apart.
    began = time.time()
    dify.add_run("running", user="us", inputs={"n": "other"})
    search = RunSearch("us", began, user_is_unique=False, fingerprint=fingerprint({"n": "ours"})).serialize()
    payload = payload_of(trigger_of(None, search=search, poll_interval=0.05, deadline=began + 1))
    assert payload["workflow_run_id"] is None
    looks = [request for request in dify.requests if "/logs" in request.path]
    details = [request for request in dify.requests if "/run/" in request.path]
    assert len(looks) > 2
    assert len(details) == 1


def test_a_log_that_cannot_be_read_is_said_at_each_look_and_in_the_end(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture
) -> None:
    dify.misbehave_always(respond(503), only="/logs")
    search = RunSearch("us", time.time(), True).serialize()
    payload = payload_of(trigger_of(None, search=search, max_consecutive_failures=2))
    error = DifyError.from_event(payload["error"])
    assert type(error) is DifyWorkflowRunUncertain
    assert error.user == "us"
    assert len(dify.requests) == 3
    assert "503" in str(error)
    assert str(error).endswith("The log could not be read, so the run of user 'us' was not found.")
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(lines) == 2
    assert all(line.startswith("Dify's log could not be read; looking again: ") and "503" in line for line in lines)


def test_a_killed_wait_for_a_queued_run_stops_it_if_it_has_begun(dify: DifyStandIn) -> None:
    task_id = str(uuid.uuid4())
    dify.add_run("running", user="us")
    search = RunSearch("us", time.time(), True).serialize()
    run(trigger_of(None, search=search, stop_task_id=task_id, stop_user="us").on_kill())
    assert dify.stopped == [(task_id, "us")]


@pytest.mark.parametrize("is_unique", [True, False])
def test_a_killed_wait_for_a_queued_run_says_that_the_run_will_run(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, is_unique: bool
) -> None:
    if not is_unique:
        # It may be another task's.
        dify.add_run("running", user="us")
    search = RunSearch("us", time.time(), is_unique).serialize()
    run(trigger_of(None, search=search, stop_task_id="t", stop_user="us").on_kill())
    assert dify.stopped == []
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "The workflow run of user 'us' is queued, and Dify stops no queued run: it runs later." in warning


def test_a_wait_that_breaks_says_what_broke(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise KeyError("x" * 1000)

    monkeypatch.setattr("airflow_provider_dify.runs.waiting.WaitArguments.judge", broken)
    run_id = dify.add_run("running")
    payload = payload_of(trigger_of(run_id))
    assert (payload["end"], payload["status"]) == ("failed", None)
    assert payload["message"].startswith(f"The wait for Dify workflow run {run_id} broke: KeyError: 'xxx")
    assert len(payload["message"]) < 450
    assert str(DifyError.from_event(payload["error"])) == payload["message"]
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.getMessage() == f"The wait for Dify workflow run {run_id} broke."


# --- the event loop


def test_nothing_blocks_the_loop(dify: DifyStandIn) -> None:
    first = dify.add_run("succeeded")
    others = [dify.add_run(*["running"] * 3, "succeeded") for _ in range(20)]
    are_over = asyncio.Event()

    async def answer_last(request: Any) -> Any:
        while not are_over.is_set():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        return await dify.respond_to(request)

    dify.misbehave_always(answer_last, only=first)

    async def work() -> None:
        waits_first = asyncio.create_task(events_of(trigger_of(first)))
        await until(lambda: bool(dify.requests))
        await asyncio.gather(*(events_of(trigger_of(run_id)) for run_id in others))
        assert not waits_first.done()
        are_over.set()
        await waits_first

    run(work())


def test_the_server_is_named_once(dify: DifyStandIn, caplog: pytest.LogCaptureFixture, dialect: str) -> None:
    caplog.set_level(logging.INFO, "wait")
    payload_of(trigger_of(dify.add_run("running", "running", "succeeded")))
    lines = [record.getMessage() for record in caplog.records if "Dify " in record.getMessage()]
    assert [line for line in lines if " at " in line] == [
        f"Dify {dify.dialect_rules.server_version} at {dify.base_url}"
    ]


def test_what_changes_is_logged_and_not_each_poll(dify: DifyStandIn, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    run_id = dify.add_run("running", "running", "paused", "paused", "running", "succeeded")
    payload_of(trigger_of(run_id))
    logged = [record.getMessage() for record in caplog.records if run_id in record.getMessage()]
    assert [re.sub(r".* (is \w+|succeeded).*", r"\1", line) for line in logged] == [
        "is running",
        "is paused",
        "is running",
        "succeeded",
    ]


@pytest.mark.long
def test_five_hundred_waits_started_and_cancelled_at_random_leave_nothing(
    dify: DifyStandIn, connection_with: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    connection_with(timeout=0.3)
    dice = random.Random(7)
    faults = [
        lambda: respond(503),
        lambda: reset(),
        lambda: stall(0.5),
        lambda: truncate_body(reset=True),
        lambda: truncate_body(reset=False),
        lambda: close_after(dify),
        lambda: html(),
    ]

    async def misbehave(request: Any) -> Any:
        if dice.random() < 0.5:
            return await dice.choice(faults)()(request)
        return await dify.respond_to(request)

    dify.misbehave_always(misbehave)
    runs = [dify.add_run(*["running"] * dice.randrange(6), "succeeded") for _ in range(500)]

    async def one(run_id: str) -> None:
        await asyncio.sleep(dice.random())
        wait = asyncio.create_task(events_of(trigger_of(run_id, max_consecutive_failures=None)))
        if dice.random() < 0.7:
            await asyncio.sleep(dice.random() * dice.choice([0.001, 0.1, 1.0]))
            wait.cancel()
            await asyncio.gather(wait, return_exceptions=True)
        else:
            (event,) = await wait
            assert event.payload["status"] == "succeeded"

    async def all_of_them() -> None:
        await asyncio.gather(*(one(run_id) for run_id in runs))

    # run() finds no task and no session left, and no warning of an unclosed socket.
    run(all_of_them())
    assert "was never retrieved" not in caplog.text
    assert "Unclosed" not in caplog.text
