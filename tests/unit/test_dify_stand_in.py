"""The stand-in for Dify answers as the recorded servers did; it queues, rejects, stops and resumes runs as they did."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Recording,
    Start,
    form_field,
)
from tests.dify_stand_in.dialects import DIALECT_OF_VERSION
from tests.dify_stand_in.events import parse, split

pytestmark = pytest.mark.long

UNKNOWN = "e0989228-cbd1-4481-aaf0-f4bf5fe66f4c"
QUERY_IS_REQUIRED = [form_field("query", required=True)]


class Client:
    """A client of the stand-in, with as little of its own as can be."""

    def __init__(self, dify: DifyStandIn) -> None:
        self.dify = dify
        self.http = requests.Session()
        self.http.headers["Authorization"] = f"Bearer {API_KEY}"
        self.responses: list[requests.Response] = []

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        for response in self.responses:
            response.close()
        self.http.close()

    def get(self, path: str, **arguments: Any) -> requests.Response:
        return self.request("GET", path, **arguments)

    def post(self, path: str, body: Any = None, **arguments: Any) -> requests.Response:
        return self.request("POST", path, json=body, **arguments)

    def request(self, method: str, path: str, **arguments: Any) -> requests.Response:
        self.responses.append(self.http.request(method, self.dify.base_url + path, **{"timeout": 60, **arguments}))
        return self.responses[-1]

    def start(self, *, user: str = "u1", mode: str = "streaming", **inputs: Any) -> requests.Response:
        body = {"inputs": inputs, "response_mode": mode, "user": user}
        return self.post("/workflows/run", body, stream=mode == "streaming")

    def detail(self, run_id: str) -> requests.Response:
        return self.get(f"/workflows/run/{run_id}")

    def status(self, run_id: str) -> str:
        return str(self.detail(run_id).json()["status"])

    def log(self, **query: Any) -> Any:
        return self.get("/workflows/logs", params=query).json()

    def stop(self, task_id: str) -> requests.Response:
        return self.post(f"/workflows/tasks/{task_id}/stop", {"user": "u1"})


@pytest.fixture
def client(dify: DifyStandIn) -> Iterator[Client]:
    with Client(dify) as client:
        yield client


def events_of(response: requests.Response) -> Iterator[dict[str, Any]]:
    """Return the events that are still to come; a ping is ``{"event": "ping"}``."""
    if not hasattr(response, "events"):
        response.events = _read_events(response)  # type: ignore[attr-defined]
    events: Iterator[dict[str, Any]] = response.events
    return events


def _read_events(response: requests.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line == b"event: ping":
            yield {"event": "ping"}
        elif line.startswith(b"data: "):
            yield json.loads(line.removeprefix(b"data: "))


def names_of(response: requests.Response) -> list[str]:
    return [event["event"] for event in events_of(response)]


def ids_of(response: requests.Response) -> tuple[str, str]:
    """Read up to ``workflow_started`` and return the ids of run and task."""
    started = next(event for event in events_of(response) if event["event"] == "workflow_started")
    return started["workflow_run_id"], started["task_id"]


def eventually(holds: Callable[[], bool], seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if holds():
            return True
        time.sleep(0.02)
    return holds()


# --- each recorded request


def shape_of(value: Any) -> Any:
    """Return the keys of an object and of the objects in it; outputs and inputs are the workflow's."""
    if isinstance(value, dict):
        return {key: shape_of(value[key]) for key in sorted(value) if key not in ("outputs", "inputs")}
    return [shape_of(value[0])] if isinstance(value, list) and value else None


def assert_as_recorded(response: requests.Response, name: str, version: str) -> None:
    recording = Recording.load(name, version)
    assert response.status_code == recording.status
    assert response.headers["X-Version"] == DIALECT_OF_VERSION[version].server_version
    assert response.headers["Content-Type"] == recording.headers["Content-Type"]
    if "json" in response.headers["Content-Type"]:
        assert shape_of(response.json()) == shape_of(recording.fields())


@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("app_info", "/info", None),
        ("app_parameters", "/parameters", None),
        ("detail_unknown_uuid", f"/workflows/run/{UNKNOWN}", None),
        ("detail_not_a_uuid", "/workflows/run/not-a-uuid", None),
        ("detail_empty_id", "/workflows/run/", None),
        ("detail_double_slash", f"//workflows/run/{UNKNOWN}", None),
        ("logs_bad_limit", "/workflows/logs?limit=101", None),
        ("logs_status_running", "/workflows/logs?status=running", None),
        ("logs_after_bad", "/workflows/logs?created_at__after=yesterday", None),
        ("logs_user_unknown", "/workflows/logs?created_by_end_user_session_id=nobody", None),
        ("events_unknown", f"/workflow/{UNKNOWN}/events?user=u1", None),
        ("route_unknown", "/no-such-route", None),
        ("form_get_unknown", "/form/human_input/RVgjTsEsFfAVVnFCnBQsm2", None),
        ("run_missing_user", "/workflows/run", {"inputs": {}, "response_mode": "streaming"}),
        ("stop_no_user", f"/workflows/tasks/{UNKNOWN}/stop", {}),
        ("stop", f"/workflows/tasks/{UNKNOWN}/stop", {"user": "u1"}),
        ("run_blocking_succeeded_echo", "/workflows/run", {"inputs": {}, "user": "u1"}),
        ("run_streaming_echo", "/workflows/run", {"inputs": {}, "response_mode": "streaming", "user": "u1"}),
        ("run_missing_inputs", "/workflows/run", {"response_mode": "streaming", "user": "u1"}),
        ("run_bad_response_mode", "/workflows/run", {"inputs": {}, "response_mode": "telepathy", "user": "u1"}),
        ("stop_not_a_uuid", "/workflows/tasks/not-a-uuid/stop", {"user": "u1"}),
    ],
)
def test_it_answers_as_recorded(client: Client, dialect: str, name: str, path: str, body: Any) -> None:
    if name == "form_get_unknown" and "1.14" <= dialect < "1.17":
        pytest.skip("not recorded")
    answer = client.get(path, allow_redirects=False) if body is None else client.post(path, body)
    assert_as_recorded(answer, name, dialect)


@pytest.mark.parametrize(
    "status",
    ["running", "paused", "succeeded", "partial-succeeded", "failed", "stopped", "detail_succeeded_no_outputs"],
)
def test_a_detail_has_the_recorded_fields(client: Client, dify: DifyStandIn, dialect: str, status: str) -> None:
    response = client.detail(dify.add_run(status))
    assert_as_recorded(response, "detail_succeeded_echo", dialect)
    assert status in ("detail_succeeded_no_outputs", response.json()["status"])
    outputs = response.json()["outputs"]
    assert outputs is None or isinstance(outputs, str) if dialect == "1.12.1" else isinstance(outputs, dict)


def test_wrong_keys_and_other_apps_are_refused(client: Client, dify: DifyStandIn, dialect: str) -> None:
    without = requests.get(f"{dify.base_url}/info", timeout=10)
    assert_as_recorded(without, "auth_none", dialect)
    dify.api_keys = {"another"}
    assert_as_recorded(client.get("/info"), "auth_bad_key", dialect)
    dify.api_keys = {API_KEY}
    dify.app_info = "app_info_chat"
    assert_as_recorded(client.start(), "run_chat_key", dialect)
    assert_as_recorded(client.detail(UNKNOWN), "detail_key_of_chat_app", dialect)


# --- streams, slots and silence


@pytest.mark.parametrize(
    ("recording", "status"),
    [
        ("run_streaming_echo", "succeeded"),
        ("run_streaming_failed", "failed"),
        ("run_streaming_partial", "partial-succeeded"),
        ("run_streaming_no_outputs", "succeeded"),
        ("run_streaming_paused", "paused"),
    ],
)
def test_a_stream_has_the_recorded_events_and_the_detail_their_end(
    client: Client, dify: DifyStandIn, dialect: str, recording: str, status: str
) -> None:
    dify.starts.append(Start(recording))
    response = client.start()
    events = list(events_of(response))
    recorded = Recording.load(recording, dialect).body.replace(b"event: ping\n\n", b"").count(b"\n\n")
    assert len([event for event in events if event["event"] != "ping"]) == recorded
    assert (events[0]["event"] == "ping") == (dialect != "1.12.1")
    (started,) = dify.started
    assert {event.get("workflow_run_id") for event in events if event["event"] != "ping"} == {started.workflow_run_id}
    assert {event.get("task_id") for event in events if event["event"] != "ping"} == {started.task_id}
    assert client.status(started.workflow_run_id) == status


def test_a_streaming_start_queues_without_a_slot(client: Client, dify: DifyStandIn, dialect: str) -> None:
    dify.slots = 1
    dify.starts.append(Start(duration=120))
    _, task_id = ids_of(client.start(user="first"))
    second = client.start(user="second")
    assert second.status_code == 200
    events = events_of(second)
    if dialect == "1.12.1":
        assert next(events)["event"] == "workflow_started"
        return
    assert next(events)["event"] == "ping"
    queued = dify.started[1]
    assert client.detail(queued.workflow_run_id).status_code == client.detail(UNKNOWN).status_code
    assert client.log(created_by_end_user_session_id="second")["total"] == 0
    client.stop(task_id)
    # Then silence, not a ping, up to the slot.
    assert next(events)["event"] == "workflow_started"
    assert client.log(created_by_end_user_session_id="second")["total"] == 1


@pytest.mark.parametrize("hang_up", [False, True])
def test_a_queued_start_is_closed_after_the_silence_and_runs_later(
    client: Client, dify: DifyStandIn, dialect: str, hang_up: bool
) -> None:
    if dialect == "1.12.1":
        pytest.skip("1.12.1 does not queue")
    dify.slots = 0
    dify.silence_limit = 0.3
    response = client.start(user="queued")
    if hang_up:
        response.close()
    else:
        assert names_of(response) == ["ping"]
    assert client.log()["total"] == 0
    dify.slots = 1
    assert eventually(lambda: client.log(created_by_end_user_session_id="queued")["total"] == 1)
    assert client.status(dify.started[0].workflow_run_id) == "succeeded"


def test_a_blocking_start_does_not_queue_and_ends_with_a_pause(client: Client, dify: DifyStandIn, dialect: str) -> None:
    dify.slots = 0
    dify.silence_limit = 0.2
    recordings = ("run_streaming_failed", "run_streaming_paused")
    dify.starts.extend([Start(fields={"outputs": {"a": 1}}), *map(Start, recordings)])
    response = client.start(mode="blocking").json()
    assert response["workflow_run_id"] == dify.started[0].workflow_run_id
    assert response["data"]["outputs"] == {"a": 1}
    assert client.start(mode="blocking").json()["data"]["status"] == "failed"
    paused = client.start(mode="blocking")
    if dialect == "1.12.1":
        assert paused.status_code == 504
    else:
        assert_as_recorded(paused, "run_blocking_paused", dialect)
        assert paused.json()["data"]["status"] == "paused"


def test_a_limit_of_active_runs_holds_for_starts_that_come_at_once_and_for_queued_ones(
    client: Client, dify: DifyStandIn, dialect: str
) -> None:
    dify.active_runs_limit = 5
    dify.slots = 2
    dify.run_duration = 120
    with ThreadPoolExecutor(20) as pool:
        responses = list(pool.map(lambda number: client.start(user=f"u{number}"), range(20)))
    assert [response.status_code for response in responses].count(200) == len(dify.started) == 5
    # What was turned away started nothing.
    for response in responses:
        if response.status_code != 200:
            assert_as_recorded(response, "run_rate_limited_streaming", dialect)
            assert response.json()["message"].startswith("Too many requests. Please try again later.")
            assert response.json()["message"].endswith(" 5.")
    dify.active_runs_limit = None
    assert client.start().status_code == 200


# --- inputs


def test_a_missing_required_input_is_rejected_as_each_version_does(
    client: Client, dify: DifyStandIn, dialect: str
) -> None:
    dify.silence_limit = 0.3
    dify.user_input_form = QUERY_IS_REQUIRED
    response = client.start(user="u-missing")
    assert_as_recorded(response, "run_streaming_missing_input", dialect)
    if dialect == "1.12.1":
        assert response.json()["message"] == "query is required in input form"
    elif dialect in ("1.13.0", "1.14.2"):
        assert names_of(response) == ["ping"]
    else:
        ping, begun, ended = events_of(response)
        assert (ping["event"], begun["event"], ended["event"]) == ("ping", "workflow_started", "workflow_finished")
        assert begun["task_id"] == begun["workflow_run_id"] == ended["workflow_run_id"]
        assert not [name for name in begun["data"]["inputs"] if name.startswith("sys.")]
        assert (ended["data"]["status"], ended["data"]["error"]) == ("failed", "query is required in input form")
        assert ended["data"]["created_by"] == {}
        assert client.detail(begun["workflow_run_id"]).status_code == 404
        assert client.get(f"/workflow/{begun['workflow_run_id']}/events?user=u-missing").status_code == 404
    assert client.log()["total"] == 0
    assert dify.started == []
    blocking = client.start(mode="blocking")
    assert_as_recorded(blocking, "run_blocking_missing_input", dialect)


def test_a_rejection_queues_too_where_it_is_a_phantom_run() -> None:
    with DifyStandIn("1.16.1") as dify, Client(dify) as client:
        dify.slots = 0
        dify.silence_limit = 0.3
        dify.user_input_form = QUERY_IS_REQUIRED
        assert names_of(client.start()) == ["ping"]


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (form_field("a", "select", options=("x", "y")), "z", "one of the following"),
        (form_field("a", "number"), "seven", "a valid number"),
        (form_field("a", max_length=3), "1234", "less than 3 characters"),
        (form_field("a", "paragraph"), 5, "a string"),
        (form_field("a", "file"), "x", "a file"),
        (form_field("a", "file-list", max_length=1), [{}, {}], "less than 1 files"),
        (form_field("a", "json_object"), "x", "a dict"),
    ],
)
def test_a_wrong_value_is_rejected(client: Client, dify: DifyStandIn, field: Any, value: Any, reason: str) -> None:
    dify.user_input_form = [field]
    response = client.start(a=value)
    assert response.status_code == 400
    assert reason in response.json()["message"]
    assert client.start().status_code == 200


def test_the_form_is_shown_and_what_it_does_not_know_is_dropped(
    client: Client, dify: DifyStandIn, dialect: str
) -> None:
    shown = client.get("/parameters").json()["user_input_form"]
    assert shown
    assert not any(field["required"] for entry in shown for field in entry.values())
    client.start(anything="kept")
    dify.user_input_form = QUERY_IS_REQUIRED
    assert client.get("/parameters").json()["user_input_form"] == QUERY_IS_REQUIRED
    client.start(query="q", qurey="dropped")
    assert [started.inputs for started in dify.started] == [{"anything": "kept"}, {"query": "q"}]


def test_a_file_of_another_user_and_a_wrong_upload_are_rejected(
    client: Client, dify: DifyStandIn, dialect: str
) -> None:
    dify.silence_limit = 0.2
    uploaded = client.post("/files/upload", files={"file": ("r.txt", b"x", "text/plain")}, data={"user": "u-file"})
    assert_as_recorded(uploaded, "file_upload", dialect)
    file = {"type": "document", "transfer_method": "local_file", "upload_file_id": uploaded.json()["id"]}
    assert names_of(client.start(user="u-file", report=file))[-1] == "workflow_finished"
    events = list(events_of(client.start(user="somebody", report=file)))
    if dialect < "1.14":
        assert events[-1]["data"]["status"] == "succeeded"
    elif dialect == "1.14.2":
        assert events == [{"event": "ping"}]
    else:
        assert events[-1]["data"]["error"] == "Invalid upload file"
    without_type = client.post("/files/upload", files={"file": ("r.txt", b"x")}, data={"user": "u"})
    assert (without_type.status_code, without_type.json()["code"]) == (415, "unsupported_file_type")
    nothing = client.post("/files/upload", files={"other": ("r.txt", b"x", "text/plain")})
    assert_as_recorded(nothing, "file_upload_no_file", dialect)
    dify.upload_limit = 10
    large = client.post("/files/upload", files={"file": ("r.txt", b"x" * 11, "text/plain")})
    assert_as_recorded(large, "file_upload_too_large", dialect)


# --- stops


def test_a_stop_ends_the_stream_and_shows_in_the_detail_from_1_16_on(
    client: Client, dify: DifyStandIn, dialect: str
) -> None:
    dify.ping_interval = 0.05
    dify.starts.append(Start(duration=120))
    response = client.start()
    run_id, task_id = ids_of(response)
    assert_as_recorded(client.stop(run_id), "stop", dialect)
    assert client.status(run_id) == "running"
    assert client.log(created_by_end_user_session_id="u1")["data"][0]["workflow_run"]["status"] == "running"
    assert "ping" in [next(events_of(response))["event"] for _ in range(30)]
    assert client.stop(task_id).json() == {"result": "success"}
    last = list(events_of(response))[-1]
    assert (last["event"], last["data"]["status"]) == ("workflow_finished", "stopped")
    stopped = eventually(lambda: client.status(run_id) == "stopped", seconds=60 if dialect >= "1.16" else 0.5)
    assert stopped == (dialect >= "1.16")
    if dialect == "1.17":
        recorded = split(Recording.load("run_streaming_stopped", dialect).body)[-1]
        assert shape_of(last) == shape_of(parse(recorded))
        assert last["data"]["error"] == parse(recorded)["data"]["error"]
        assert client.detail(run_id).json()["error"] == Recording.load("detail_stopped", dialect).fields()["error"]
    assert [stop[0] for stop in dify.stopped] == [run_id, task_id]
    if dialect == "1.14.2":
        # A stopped run that stays running has only pings on the events route.
        again = events_of(client.get(f"/workflow/{run_id}/events?user=u1", stream=True))
        names = [next(again)["event"] for _ in range(6)]
        assert names[-3:] == ["ping"] * 3


def test_a_paused_run_cannot_be_stopped(client: Client, dify: DifyStandIn, dialect: str) -> None:
    dify.stop_delay = 0.0
    dify.starts.append(Start("run_streaming_paused"))
    run_id, task_id = ids_of(client.start())
    client.stop(task_id)
    time.sleep(0.1)
    assert client.status(run_id) == "paused"


# --- pauses and events


@pytest.mark.parametrize("stopped", [False, True])
def test_a_resumed_run_ends_as_each_version_ends_it(
    client: Client, dify: DifyStandIn, dialect: str, stopped: bool
) -> None:
    if dialect == "1.12.1":
        pytest.skip("1.12.1 has no forms")
    dify.starts.append(Start("run_streaming_paused"))
    events = list(events_of(client.start(user="u1")))
    required = next(event for event in events if event["event"] == "human_input_required")
    run_id, token = required["workflow_run_id"], required["data"]["form_token"]
    assert required["data"]["expiration_time"] > time.time()
    if stopped:
        client.stop(required["task_id"])
    if dialect == "1.13.0":
        assert_as_recorded(client.get(f"/form/human_input/{token}"), "form_get", dialect)
        assert dify.submit_form(run_id, comment="fine") is None
    else:
        path = f"/form/human_input/{token}"
        assert_as_recorded(client.get(path), "form_get", dialect)
        bad_action = client.post(path, {"inputs": {"comment": "c"}, "action": "maybe", "user": "u1"})
        assert_as_recorded(bad_action, "form_submit_bad_action", dialect)
        missing = client.post(path, {"inputs": {}, "action": "yes", "user": "u1"})
        assert_as_recorded(missing, "form_submit_missing_input", dialect)
        assert missing.json()["message"] == "Missing required inputs: comment"
        sent = {"inputs": {"comment": "fine"}, "action": "yes", "user": "u1"}
        assert_as_recorded(client.post(path, sent), "form_submit", dialect)
        assert_as_recorded(client.post(path, sent), "form_submit_again", dialect)
        assert_as_recorded(client.get(path), "form_get_submitted", dialect)
    if stopped and dialect < "1.16":
        time.sleep(0.3)
        assert client.status(run_id) == "running"
        return
    end = "stopped" if dialect == "1.16.1" or stopped else "succeeded"
    assert eventually(lambda: client.status(run_id) == end)
    detail = client.detail(run_id).json()
    if stopped and dialect == "1.17":
        assert (detail["outputs"], detail["error"]) == ({}, "Aborted: User requested stop")
        return
    assert detail["outputs"] == {"comment": "fine", "text": "q"}
    reason = "Aborted: Client response stream closed before app execution completed"
    assert detail["error"] == (reason if dialect == "1.16.1" else None)


def test_the_events_of_a_running_run_come_again(client: Client, dify: DifyStandIn, dialect: str) -> None:
    dify.starts.append(Start(duration=5.0))
    response = client.start(user="u1")
    run_id, task_id = ids_of(response)
    path = f"/workflow/{run_id}/events"
    if dialect < "1.14":
        assert_as_recorded(client.get(f"{path}?user=u1"), "events_unknown", dialect)
        return
    assert_as_recorded(client.get(path), "events_running_no_user", dialect)
    assert_as_recorded(client.get("/workflow/not-a-uuid/events?user=u1"), "events_not_a_uuid", dialect)
    assert_as_recorded(client.get(f"{path}?user=somebody"), "events_running_wrong_user", dialect)
    live = client.get(f"{path}?user=u1", stream=True)
    assert live.headers["X-Version"] == DIALECT_OF_VERSION[dialect].server_version
    with_snapshot = client.get(f"{path}?user=u1&include_state_snapshot=true", stream=True)
    events = list(events_of(with_snapshot))
    assert [event["event"] for event in events[:2]] == ["ping", "workflow_started"]
    # The real task id is in the live events alone.
    assert events[1]["task_id"] == run_id
    assert events[-1]["event"] == "workflow_finished"
    assert events[-1]["task_id"] == task_id
    only_live = [event for event in events_of(live) if event["event"] != "ping"]
    assert only_live[0]["event"] == "node_started"
    assert {event["task_id"] for event in only_live} == {task_id}
    (over,) = events_of(client.get(f"{path}?user=u1"))
    assert (over["event"], over["task_id"], over["data"]["status"]) == ("workflow_finished", run_id, "succeeded")


def test_the_events_of_a_paused_run_come_again_and_go_on(client: Client, dify: DifyStandIn, dialect: str) -> None:
    if dialect < "1.14":
        pytest.skip("no such route")
    dify.ping_interval = 0.1
    dify.starts.append(Start("run_streaming_paused"))
    run_id, task_id = ids_of(client.start(user="u1"))
    path = f"/workflow/{run_id}/events?user=u1"
    snapshot = list(events_of(client.get(f"{path}&include_state_snapshot=true")))
    assert snapshot[-1]["event"] == "workflow_paused"
    assert {event["task_id"] for event in snapshot[1:]} == {task_id}
    silent = events_of(client.get(path, stream=True))
    assert [next(silent)["event"] for _ in range(3)] == ["ping"] * 3
    across = client.get(f"{path}&include_state_snapshot=true&continue_on_pause=true", stream=True)
    dify.submit_form(run_id, comment="fine")
    names = [name for name in names_of(across) if name != "ping"]
    assert names.count("workflow_started") == 2
    assert names[-1] == "workflow_finished"


# --- the log


def test_the_log_has_the_recorded_rows_newest_first(client: Client, dify: DifyStandIn, dialect: str) -> None:
    dify.starts.extend([Start(), Start("run_streaming_failed"), Start("run_streaming_paused")])
    for user in ("a", "b", "a"):
        names_of(client.start(user=user))
    page = client.log()
    assert shape_of(page) == shape_of(Recording.load("logs", dialect).fields())
    assert [row["workflow_run"]["id"] for row in page["data"]] == [s.workflow_run_id for s in reversed(dify.started)]
    assert [row["created_by_end_user"]["session_id"] for row in page["data"]] == ["a", "b", "a"]
    assert [row["workflow_run"]["exceptions_count"] for row in page["data"]] == [0, 1, 0]
    assert {row["workflow_run"]["triggered_from"] for row in page["data"]} == {"app-run"}
    assert client.log(status="failed")["total"] == 1
    assert client.log(created_by_end_user_session_id="a")["total"] == 2
    dify.logs_ignore_user = True
    assert client.log(created_by_end_user_session_id="a")["total"] == 3


def test_ten_thousand_logged_runs_come_in_pages(client: Client, dify: DifyStandIn) -> None:
    now = int(time.time())
    ids = dify.add_logged_runs(10_000, user=lambda number: f"batch/{number % 5_000}.0", ending=now)
    pages = [client.log(limit=100, page=page) for page in range(1, 101)]
    rows = [row for page in pages for row in page["data"]]
    assert [row["workflow_run"]["id"] for row in rows] == ids[::-1]
    assert len({row["id"] for row in rows}) == 10_000
    assert rows[0]["created_by_end_user"]["session_id"] == "batch/4999.0"
    page = pages[2]
    assert (page["page"], page["limit"], page["total"], page["has_more"]) == (3, 100, 10_000, True)
    assert pages[-1]["has_more"] is False
    of_a_user = client.log(created_by_end_user_session_id="batch/17.0")
    assert [row["workflow_run"]["id"] for row in of_a_user["data"]] == [ids[5_017], ids[17]]
    after = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - 9))
    assert client.log(created_at__after=after)["total"] == 10
    before = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime(now - 9_998))
    assert client.log(created_at__before=before)["total"] == 2
    assert client.get("/workflows/logs?limit=0").status_code == 400
    assert client.get("/workflows/logs?page=x").status_code == 400
    assert client.get("/workflows/logs?unknown=x").status_code == 200


def test_rows_of_one_second_stand_in_another_order_on_each_page(client: Client, dify: DifyStandIn) -> None:
    for _ in range(5):
        dify.add_logged_runs(2, ending=1_800_000_000)
    pages = [client.log(limit=3, page=page)["data"] for page in (1, 2, 3, 4)]
    shown = [row["workflow_run"]["id"] for page in pages for row in page]
    assert len(shown) == 10
    assert len(set(shown)) < 10
    seconds = [row["created_at"] for page in pages for row in page]
    assert seconds == sorted(seconds, reverse=True)
