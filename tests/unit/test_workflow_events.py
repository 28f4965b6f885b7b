"""Dify's event stream, cut in every way in which it may arrive."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_provider_dify.api.events import EventStreamReader, WorkflowEvent
from airflow_provider_dify.runs.following import RunProgress
from tests.dify_stand_in import RECORDED, Recording

STREAMS = sorted(
    path.stem for path in RECORDED.glob("run_streaming_*.http") if b"text/event-stream" in path.read_bytes()
)


def read(*pieces: bytes) -> list[WorkflowEvent]:
    reader = EventStreamReader()
    return [event for piece in pieces for event in reader.feed(piece)]


def expected(stream: bytes) -> list[dict[str, object]]:
    blocks = stream.decode().replace("\r\n", "\n").split("\n\n")
    return [json.loads(block.removeprefix("data: ")) for block in blocks if block.startswith("data: ")]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("line_end", [b"\n", b"\r\n"])
@pytest.mark.parametrize("step", [61, pytest.param(1, marks=pytest.mark.long)])
def test_a_recorded_stream_is_read_the_same_wherever_it_is_cut(name: str, line_end: bytes, step: int) -> None:
    stream = Recording.load(name).body.replace(b"\n", line_end)
    whole = read(stream)
    recorded = expected(stream)
    assert sum(event.name == "ping" for event in whole) == stream.count(b"event: ping")
    with_data = [event for event in whole if event.name != "ping"]
    assert [event.name for event in with_data] == [event["event"] for event in recorded]
    assert [event.data for event in with_data] == [event["data"] for event in recorded]
    assert whole[0].name == "workflow_started"
    assert {event.workflow_run_id for event in with_data} == {recorded[0]["workflow_run_id"]}
    for cut in range(0, len(stream), step):
        assert read(stream[:cut], stream[cut:]) == whole
    assert read(*(stream[i : i + 1] for i in range(len(stream)))) == whole


def test_pings_are_events_and_comments_and_other_fields_are_skipped() -> None:
    assert read(b'event: ping\n\n: hello\n\nid: 7\nretry: 5\ndata: {"event": "x"}\n\nevent: ping\n\n') == [
        WorkflowEvent("ping", None, None, {}),
        WorkflowEvent("x", None, None, {}),
        WorkflowEvent("ping", None, None, {}),
    ]


@pytest.mark.parametrize(
    "stream",
    [
        b'data: {"event": "x"}\r\n\r\n',
        b'data:{"event": "x"}\n\n',
        b'\ndata: {"event": "x"}\n\n',
        b'\r\n\r\ndata: {"event": "x"}\r\n\r\n',
        b'event: other\ndata: {"event": "x"}\n\n',
    ],
)
@pytest.mark.parametrize("size", [1, 2, 3, 100])
def test_an_event_comes_with_its_last_byte(stream: bytes, size: int) -> None:
    reader = EventStreamReader()
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    assert [reader.feed(piece) for piece in pieces] == [[]] * (len(pieces) - 1) + [[WorkflowEvent("x", None, None, {})]]


@pytest.mark.parametrize("ping", [b"event:ping\n\n", b"event: ping\n\n", b"event:  ping \r\n\r\n"])
def test_a_ping_is_one_however_it_is_written(ping: bytes) -> None:
    assert read(b"\n" + ping + b"\n" + ping) == [WorkflowEvent("ping", None, None, {})] * 2


@pytest.mark.parametrize("value", [5, "", None, ["a"]])
def test_an_id_that_is_none_is_left_out(value: Any) -> None:
    event = json.dumps({"event": "x", "task_id": value, "workflow_run_id": value, "data": {}}).encode()
    assert read(b"data: " + event + b"\n\n") == [WorkflowEvent("x", None, None, {})]


def test_data_of_several_lines_is_one_event() -> None:
    assert read(b'data: {"event":\ndata:"x", "data": {"a": 1}}\n\n') == [WorkflowEvent("x", None, None, {"a": 1})]


def test_an_event_of_megabytes_arrives_in_small_pieces() -> None:
    text = "二" * 1_000_000
    stream = b"data: " + json.dumps({"event": "x", "data": {"text": text}}, ensure_ascii=False).encode() + b"\n\n"
    pieces = [stream[i : i + 1000] for i in range(0, len(stream), 1000)]
    (event,) = read(*pieces)
    assert event.data["text"] == text


@pytest.mark.parametrize(
    "broken", [b"data: {broken\n\n", b"data: [1]\n\n", b'data: {"no": "event"}\n\n', b"data: \xff\n\n"]
)
def test_an_event_of_another_shape_is_left_out_with_a_warning(broken: bytes, caplog: pytest.LogCaptureFixture) -> None:
    events = read(broken + broken + b'data: {"event": "x"}\n\n')
    assert [event.name for event in events] == ["x"]
    assert caplog.text.count("could not be read and is left out") == 1


def test_node_events_become_lines_and_others_do_not() -> None:
    progress = RunProgress()
    lines = [progress.on_event(event) for event in read(Recording.load("run_streaming_failed").body)]
    assert [line for line in lines if line] == [
        "Node 'start' (start) started.",
        "Node 'start' (start) succeeded after 0.01 seconds.",
        "Node 'http' (http-request) started.",
        "Node 'http' (http-request) failed after 0.03 seconds: [Errno 111] Connection refused.",
    ]
    used = WorkflowEvent(
        "node_finished",
        "r",
        "t",
        {"title": "LLM", "node_type": "llm", "status": "succeeded", "elapsed_time": 1.5,
         "execution_metadata": {"total_tokens": 42}},
    )  # fmt: skip
    assert RunProgress().on_event(used) == "Node 'LLM' (llm) succeeded after 1.50 seconds, 42 tokens."


def test_an_error_event_has_the_fields_beside_its_name() -> None:
    (event,) = read(b'data: {"event": "error", "status": 400, "code": "invalid_param", "message": "no"}\n\n')
    assert event.is_ending
    assert event.data == {"status": 400, "code": "invalid_param", "message": "no"}


@pytest.mark.parametrize("depth", range(800, 1000, 10))
def test_events_that_are_nested_deeply_become_lines_or_an_error_of_the_reader(depth: int) -> None:
    nested = "[" * depth + "]" * depth
    fields = ", ".join(f'"{name}": {nested}' for name in ("title", "node_type", "status", "error"))
    metadata = f'"execution_metadata": {{"currency": "USD", "total_price": {nested}}}'
    event = f'data: {{"event": "node_finished", "data": {{{fields}, {metadata}}}}}\n\n'

    def from_further_up_the_stack(calls: int) -> None:
        if calls:
            from_further_up_the_stack(calls - 1)
            return
        for parsed in events:
            assert RunProgress().on_event(parsed)

    try:
        events = EventStreamReader().feed(event.encode())
    except ValueError:
        return
    from_further_up_the_stack(50)


@pytest.mark.parametrize("price", ["1e-999999", "0e-999999", "1e999999", "NaN", "x", None, [1]])
def test_a_price_that_makes_no_sense_does_not_become_a_megabyte(price: object) -> None:
    progress = RunProgress()
    for cost in ("0.5", price):
        metadata = {"currency": "USD", "total_price": cost}
        progress.on_event(WorkflowEvent("node_finished", None, None, {"execution_metadata": metadata}))
    progress.on_event(WorkflowEvent("workflow_finished", None, None, {"status": "succeeded"}))
    assert progress.price == {"total_price": "0.5", "currency": "USD"}


def finished_event(**data: Any) -> WorkflowEvent:
    known = {"status": "succeeded", "outputs": {"a": 1}, "total_tokens": 3, "total_steps": 2, "elapsed_time": 0.5}
    return WorkflowEvent("workflow_finished", "run", "task", {**known, **data})


def test_a_run_that_succeeded_is_in_its_last_event() -> None:
    run = finished_event().succeeded_run
    assert run is not None
    assert (run.id, run.status, run.outputs, run.error) == ("run", "succeeded", {"a": 1}, None)
    assert (run.total_tokens, run.total_steps, run.elapsed_time) == (3, 2, 0.5)


@pytest.mark.parametrize(
    "data",
    [
        {"status": "failed"},
        {"status": "stopped"},
        {"status": "partial-succeeded"},
        {"status": None},
        {"outputs": None},
        {"outputs": '{"a": 1}'},
        {"total_tokens": "3"},
        {"total_steps": True},
        {"elapsed_time": None},
    ],
)
def test_of_any_other_run_the_detail_has_to_be_read(data: dict[str, Any]) -> None:
    assert finished_event(**data).succeeded_run is None


def test_no_other_event_says_that_a_run_succeeded() -> None:
    event = finished_event()
    assert WorkflowEvent("node_finished", "run", "task", event.data).succeeded_run is None
    assert WorkflowEvent("workflow_finished", None, "task", event.data).succeeded_run is None
