"""Starting, following, stopping and listing runs, and uploading files, over real sockets."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import time
from collections import UserList
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Start,
    html,
    redirect,
    rejects,
    replay,
    reset,
    respond,
    stall,
)

UUID = "2d7a7544-770c-496f-8ef9-4e622682b330"

STARTED = f'data: {{"event": "workflow_started", "task_id": "{UUID}", "workflow_run_id": "{UUID}", "data": {{}}}}\n\n'


def events(text: str) -> Any:
    """Respond with an event stream of this text."""
    return respond(200, text, content_type="text/event-stream")


Names = tuple[str, str, list[str]]
StartRun = Callable[..., Names]


NO_INPUTS: dict[str, Any] = {}


def on_a_worker(inputs: Any = NO_INPUTS, user: Any = "airflow", **arguments: Any) -> Names:
    with DifyHook(retry_delay=0.01) as hook, hook.start_workflow_run(inputs, user, **arguments) as run:
        return run.workflow_run_id, run.task_id, [event.name for event in run]


def on_an_event_loop(inputs: Any = NO_INPUTS, user: Any = "airflow", **arguments: Any) -> Names:
    async def start() -> Names:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run(inputs, user, **arguments) as run:
            return run.workflow_run_id, run.task_id, [event.name async for event in run]

    return asyncio.run(start())


@pytest.fixture(params=[on_a_worker, on_an_event_loop])
def start(request: pytest.FixtureRequest, dify_connection: str) -> StartRun:
    """Start a run with each hook, and return its ids and the names of its events."""
    return request.param


@pytest.fixture
def hook(dify: DifyStandIn, dify_connection: str) -> DifyHook:
    return DifyHook(retry_delay=0.01)


def test_a_started_run_has_its_ids_and_its_events(dify: DifyStandIn, hook: DifyHook) -> None:
    # The outputs of a mapped task are a sequence of Airflow's own, and may hold another.
    inputs = {
        "query": "héllo 你好 🎉",
        "obj": {"items": [1, None]},
        "tuple": ("a", "b"),
        "lazy": UserList([UserList("a")]),
    }
    user = "x" * 255
    with hook.start_workflow_run(inputs, user, workflow_id=UUID.upper()) as run:
        names = [event.name for event in run]
    (started,) = dify.started
    assert (run.workflow_run_id, run.task_id) == (started.workflow_run_id, started.task_id)
    assert (started.user, started.workflow_id) == (user, UUID)
    assert started.inputs == {**inputs, "tuple": ["a", "b"], "lazy": [["a"]]}
    assert names[0] == "node_started"
    assert names[-1] == "workflow_finished"
    assert hook.get_workflow_run(run.workflow_run_id).status == "succeeded"
    headers = dify.requests[0].headers
    assert headers["Authorization"] == f"Bearer {API_KEY}"
    # A stream that no proxy has to compress.
    assert (headers["Accept"], headers["Accept-Encoding"]) == ("text/event-stream", "identity")
    hook.start_workflow_run({}, "airflow").close()
    assert (dify.started[1].workflow_id, dify.started[1].user) == (None, "airflow")


@pytest.mark.parametrize(
    ("fault", "expected", "message"),
    [
        (replay("run_streaming_missing_input"), DifyInputsRejected, "query is required in input form"),
        (replay("run_unpublished"), DifyRequestError, "Workflow not published"),
        (replay("run_by_id_unknown"), DifyRequestError, "Workflow not found with id"),
        # It calls itself an event stream.
        (rejects(400, "c", "m", content_type="text/event-stream"), DifyRequestError, "^m "),
        (rejects(401, "c", "m", content_type="text/event-stream"), DifyAuthenticationError, "^m "),
    ],
)
def test_a_rejected_start_says_what_dify_said(
    dify: DifyStandIn, start: StartRun, fault: Any, expected: type[DifyRequestError], message: str
) -> None:
    dify.misbehave(fault)
    with pytest.raises(expected, match=message) as caught:
        start()
    assert message.strip("^ ") in str(caught.value.message)
    assert len(dify.requests) == 1


def test_a_server_that_refuses_connections_started_nothing(dify: DifyStandIn, start: StartRun) -> None:
    why = rf"could not be reached for the start of a workflow run at {dify.base_url}/workflows/run"
    with dify.refusing_connections(), pytest.raises(DifyConnectionError, match=why):
        start()
    start()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda: reset(), ("ClientOSError: ", "ServerDisconnectedError: ")),
        (lambda: respond(500, '{"code": "internal_server_error", "message": "broken"}'), "broken "),
        (lambda: respond(500, json.dumps({"message": f"bad {API_KEY}"})), ""),
        (lambda: replay("run_redis_down"), ""),
        (lambda: html(504), "HTTP 504, "),
        (lambda: html(200), "The response for the start of a workflow run at "),
        (lambda: events(""), "EOFError: the stream ended before the run did: "),
        (lambda: events('data: {"event": "workflow_finished"}\n\n'), "the stream begins with the event 'workflow_fin"),
        (lambda: events("data: {broken\n\n"), "EOFError: the stream ended"),
        (lambda: events('data: {"event": 5}\n\n'), "EOFError: the stream ended"),
        (lambda: events(f"data: {'[' * 100_000}\n\n"), "EOFError: the stream ended"),
        (lambda: events(STARTED.replace(f'"task_id": "{UUID}", ', "")), "EOFError: the stream ended"),
        (lambda: events(STARTED.replace(f'"workflow_run_id": "{UUID}", ', "")), "EOFError: the stream ended"),
        (lambda: events(STARTED.replace(f'"task_id": "{UUID}"', '"task_id": ""')), "EOFError: the stream ended"),
        (lambda: events(STARTED.replace(f'"task_id": "{UUID}"', '"task_id": 5')), "EOFError: the stream ended"),
    ],
)
def test_a_start_that_may_have_started_a_run_is_not_sent_again(
    dify: DifyStandIn, start: StartRun, fault: Callable[[], Any], reason: str | tuple[str, ...]
) -> None:
    dify.misbehave(fault())
    with pytest.raises(DifyWorkflowRunUncertain, match=r"may or may not have started.*'airflow'") as caught:
        start()
    assert str(caught.value).startswith(reason)
    assert f": no run id came back from {dify.base_url}/workflows/run, so Dify may" in str(caught.value)
    assert caught.value.user == "airflow"
    assert API_KEY not in str(caught.value)
    assert len(dify.requests) == 1


@pytest.mark.parametrize("then", ["close", "reset", "stall"])
@pytest.mark.parametrize("cut", [0, 10])
def test_a_stream_that_breaks_before_the_run_is_named_leaves_it_uncertain(
    dify: DifyStandIn, start: StartRun, then: str, cut: int
) -> None:
    dify.starts.append(Start(cut=cut, then=then))
    with pytest.raises(DifyWorkflowRunUncertain):
        start(timeout=1)
    assert len(dify.started) == 1


@pytest.mark.parametrize("answers", [False, True], ids=["no response", "no event"])
def test_a_start_whose_run_is_not_named_in_time_is_uncertain(dify: DifyStandIn, start: StartRun, answers: bool) -> None:
    if answers:
        dify.starts.append(Start(cut=0, then="stall"))
    else:
        dify.misbehave(stall(60))
    began = time.monotonic()
    with pytest.raises(DifyWorkflowRunUncertain, match=r"the run of user 'airflow' within 0\.5 seconds") as caught:
        start(timeout=0.5)
    assert caught.value.user == "airflow"
    assert time.monotonic() - began >= 0.5
    assert len(dify.requests) == 1


@pytest.mark.parametrize("then", ["close", "reset", "stall"])
def test_a_stream_that_breaks_later_says_so_and_the_run_is_known(
    dify: DifyStandIn, start: StartRun, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": {"timeout": 1.5}}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
    dify.starts.append(Start(cut=2000, then=then, piece=97))
    with pytest.raises(DifyConnectionError) as caught:
        start()
    (started,) = dify.started
    broken = rf"events of workflow run {started.workflow_run_id} broke off .*The run continues\."
    assert re.search(broken, str(caught.value))
    why = r"(ClientPayloadError|ClientOSError|EOFError|no event within [\d.]+ seconds).*: the events"
    assert re.match(why, str(caught.value))
    assert caught.value.server_version == "1.12.1"


@pytest.mark.parametrize(
    ("ask", "status"),
    [
        # A 302 would make a GET of it, whose response says nothing of a stop.
        (lambda hook: hook.stop_workflow_task(UUID, "airflow"), 302),
        (lambda hook: hook.stop_workflow_task(UUID, "airflow"), 307),
    ],
    ids=["302", "307"],
)
def test_a_stop_follows_no_redirect(
    dify: DifyStandIn, hook: DifyHook, ask: Callable[[DifyHook], Any], status: int
) -> None:
    dify.misbehave(*[redirect("/v1/workflows/run", status)] * 4, only="POST")
    with pytest.raises(DifyConnectionError, match="redirect"):
        ask(hook)
    assert {request.method for request in dify.requests} == {"POST"}
    assert dify.stopped == []


def test_a_start_follows_no_redirect(dify: DifyStandIn, start: StartRun) -> None:
    dify.misbehave(*[redirect(f"{dify.base_url}/workflows/run", 307)] * 4, only="POST")
    with pytest.raises(DifyConnectionError, match="redirect"):
        start()
    assert {request.method for request in dify.requests} == {"POST"}
    assert dify.started == []


def test_a_start_over_a_connection_that_the_server_has_closed_meanwhile_starts_one_run(
    dify: DifyStandIn, hook: DifyHook
) -> None:
    hook.get_parameters()
    with dify.refusing_connections():
        # It drops the connection that was kept alive.
        pass
    hook.start_workflow_run({}, "airflow").close()
    assert len(dify.started) == 1
    assert dify.connections_opened == 2


@pytest.mark.parametrize("user", ["", None, "x" * 256, 5])
def test_an_invalid_user_fails_before_any_request(dify: DifyStandIn, start: StartRun, user: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="user must be text"):
        start({}, user)
    assert dify.requests == []


@pytest.mark.parametrize(
    ("inputs", "why"),
    [
        ({"a": object()}, "object is not JSON serializable"),
        ({"a": b"x"}, "bytes is not JSON serializable"),
        ({"a": bytearray(b"x")}, "bytearray is not JSON serializable"),
        ({"a": {"x"}}, "set is not JSON serializable"),
        ({"a": float("nan")}, "not JSON compliant"),
        (None, ""),
        (5, ""),
        (["a"], ""),
    ],
)
def test_inputs_that_are_not_json_fail_before_any_request(
    dify: DifyStandIn, start: StartRun, inputs: Any, why: str
) -> None:
    with pytest.raises(DifyConfigurationError, match=f"^inputs must be an object of JSON values: .*{why}"):
        start(inputs)
    assert dify.requests == []


def test_a_run_is_stopped_by_its_task(dify: DifyStandIn, dialect: str, hook: DifyHook) -> None:
    dify.stop_delay = 0.0
    dify.starts.append(Start(statuses=("running",)))
    with hook.start_workflow_run({}, "airflow") as run:
        hook.stop_workflow_task(run.task_id, "airflow")
    assert dify.stopped == [(run.task_id, "airflow")]
    # Only 1.16 and later write the stop into the run's detail.
    assert hook.get_workflow_run(run.workflow_run_id).status == ("stopped" if dialect >= "1.16" else "running")
    with pytest.raises(DifyConfigurationError, match="task_id"):
        hook.stop_workflow_task("../info", "airflow")


def test_runs_are_listed_by_their_user(dify: DifyStandIn, hook: DifyHook) -> None:
    for user in ("a", "b", "a"):
        hook.start_workflow_run({}, user).close()
    runs = hook.list_workflow_runs(user="a")
    assert [run.workflow_run_id for run in runs] == [s.workflow_run_id for s in reversed(dify.started) if s.user == "a"]
    assert {run.user for run in runs} == {"a"}
    assert {run.status for run in runs} == {"succeeded"}
    assert runs[0].created_at is not None
    assert hook.list_workflow_runs(status="failed") == []
    with pytest.raises(DifyRequestError, match="less than or equal to 100"):
        hook.list_workflow_runs(limit=500)


def test_runs_are_listed_by_when_they_were_created(dify: DifyStandIn, hook: DifyHook) -> None:
    # The log has whole seconds.
    now = datetime.now(timezone.utc).replace(microsecond=0)
    ids = dify.add_logged_runs(10, ending=now.timestamp())
    listed = hook.list_workflow_runs(created_after=now - timedelta(seconds=3.5))
    assert [run.workflow_run_id for run in listed] == ids[:-5:-1]
    # A row whose run has no record is not listed.
    dify.runs[ids[-2]].has_no_record = True
    assert [run.workflow_run_id for run in hook.list_workflow_runs(limit=3)] == [ids[-1], ids[-3]]
    dify.misbehave(replay("logs"))
    recorded = hook.list_workflow_runs()
    assert (len(recorded), recorded[0].user) == (3, "Rig")
    assert recorded[0].workflow_run_id == "4b73a4c3-0aee-42fd-8ba6-69559cad1bf4"


def test_a_file_is_uploaded_from_a_path_and_from_an_open_file(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path
) -> None:
    path = tmp_path / "report.txt"
    path.write_bytes("完了".encode())
    assert dify.uploads[hook.upload_file(path, "airflow")] == ("report.txt", "完了".encode())
    opened = io.BytesIO(b"..content")
    opened.seek(2)
    dify.misbehave(respond(503))
    file_id = hook.upload_file(opened, "airflow", file_name="notes.md", mime_type="text/markdown")
    assert dify.uploads[file_id] == ("notes.md", b"content")


def test_a_file_that_can_be_read_only_once_is_refused(hook: DifyHook) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with open(reading, "rb") as pipe, pytest.raises(DifyConfigurationError, match="The file to upload cannot be read"):
        hook.upload_file(pipe, "airflow", file_name="x")


def test_an_upload_that_dify_rejects_says_so(dify: DifyStandIn, hook: DifyHook) -> None:
    dify.misbehave(replay("file_upload_no_file"))
    with pytest.raises(DifyRequestError, match="Please upload your file"):
        hook.upload_file(io.BytesIO(b""), "airflow", file_name="x")


def test_a_stream_may_be_closed_again_and_says_so_if_it_is_read_then(dify: DifyStandIn, hook: DifyHook) -> None:
    for _ in range(20):
        with hook.start_workflow_run({}, "airflow") as run:
            run.close()
        run.close()
        with pytest.raises(DifyConfigurationError, match="the stream was closed"):
            run.next_event(1)
        with pytest.raises(DifyConfigurationError, match="the stream was closed"):
            list(run)


@pytest.mark.usefixtures("short_grace", "quick_retries")
def test_an_earlier_run_with_the_same_inputs_is_not_taken_for_a_start_that_got_lost(
    dify: DifyStandIn, hook: DifyHook
) -> None:
    earlier = hook.run_workflow({"q": "1"}, "me", poll_interval=0.05)
    dify.misbehave(respond(502), only="GET .*/logs")
    dify.misbehave(respond(502), only="POST .*/run")
    with pytest.raises(DifyWorkflowRunUncertain) as caught:
        hook.run_workflow({"q": "1"}, "me", poll_interval=0.05)
    assert earlier.id not in str(caught.value)
    assert len(dify.started) == 1
