"""What a run's events say on the way: lines for a task's log, the node that failed, the price."""

from __future__ import annotations

import json
from decimal import Decimal
from typing import Any

import pytest

from airflow_provider_dify.api.events import EventStreamReader, WorkflowEvent
from airflow_provider_dify.runs.following import RunProgress
from tests.dify_stand_in import Recording


def event(name: str, **data: Any) -> WorkflowEvent:
    return WorkflowEvent(name, "run", "task", data)


def test_a_pause_has_its_node_its_form_and_its_end_but_never_the_forms_token() -> None:
    progress = RunProgress()
    body = Recording.load("run_streaming_paused", "1.16.1").body
    lines = [line for each in EventStreamReader().feed(body) if (line := progress.on_event(each))]
    (line,) = [line for line in lines if "waits for a person" in line]
    assert "'pause'" in line
    assert "Do you approve?" in line
    assert "expires at 2026-11-27T" in line
    form_token = next(
        json.loads(part.removeprefix(b"data: "))["data"]["form_token"]
        for part in body.split(b"\n\n")
        if b'"human_input_required"' in part[:60]
    )
    assert form_token
    assert not any(form_token in line for line in lines)


def test_the_node_that_failed_and_its_error_are_kept() -> None:
    progress = RunProgress()
    progress.on_event(event("node_finished", title="Ask", node_type="llm", status="failed", error="no such model."))
    assert progress.failed_node == "Node 'Ask' (llm) failed: no such model."


@pytest.mark.parametrize(
    ("data", "end"),
    [
        ({}, ""),
        ({"elapsed_time": 1.5}, " after 1.50 seconds"),
        ({"execution_metadata": {"total_tokens": 5}}, ", 5 tokens"),
        ({"execution_metadata": {"total_tokens": 0}}, ""),
        ({"execution_metadata": {"total_tokens": "5"}}, ""),
        ({"elapsed_time": 2, "error": "no such model."}, " after 2.00 seconds: no such model"),
    ],
)
def test_a_node_that_is_over_has_a_line_with_what_is_known(data: dict[str, Any], end: str) -> None:
    line = RunProgress().on_event(event("node_finished", title="Ask", node_type="llm", status="succeeded", **data))
    assert line == f"Node 'Ask' (llm) succeeded{end}."


@pytest.mark.parametrize(
    ("data", "end"),
    [
        ({}, ""),
        ({"form_content": "Fine?", "expiration_time": 1795856749}, ", form 'Fine?', which expires at {}"),
        ({"expiration_time": "soon"}, ""),
    ],
)
def test_a_pause_says_what_is_known_of_its_form(data: dict[str, Any], end: str) -> None:
    line = RunProgress().on_event(event("human_input_required", node_title="pause", **data))
    end = end.format("2026-11-28T09:05:49+00:00")
    assert line == f"The run is paused: it waits for a person at the node 'pause'{end}."


def test_a_node_that_runs_again_has_a_line() -> None:
    data = {"title": "Ask", "node_type": "llm", "retry_index": 2, "error": "busy"}
    assert (
        RunProgress().on_event(event("node_retry", **data)) == "Node 'Ask' (llm) failed and runs again, retry 2: busy."
    )


ITERATIONS = [("iteration_completed", "Iteration", "iteration_id"), ("loop_completed", "Loop", "loop_id")]


@pytest.mark.parametrize(("name", "word", "id_name"), ITERATIONS)
def test_an_iteration_has_one_line_and_none_for_the_nodes_of_its_items(name: str, word: str, id_name: str) -> None:
    progress = RunProgress()
    for index in range(3):
        data = {"title": f"item {index}", "node_type": "code", "status": "succeeded", id_name: "i"}
        assert progress.on_event(event("node_started", **data)) is None
        assert progress.on_event(event("node_finished", **data)) is None
    line = progress.on_event(event(name, title="Each", status="succeeded", elapsed_time=1.5, steps=3))
    assert line == f"{word} 'Each' succeeded after 1.50 seconds, 3 items."


@pytest.mark.parametrize(("name", "word", "id_name"), ITERATIONS)
def test_an_iteration_that_failed_says_why_and_so_does_the_node_in_it(name: str, word: str, id_name: str) -> None:
    progress = RunProgress()
    node = {"title": "Ask", "node_type": "llm", "status": "failed", "error": "busy", id_name: "i"}
    assert progress.on_event(event("node_finished", **node)) is None
    assert progress.failed_node == "Node 'Ask' (llm) failed: busy."
    line = progress.on_event(event(name, title="Each", status="failed", error="item 2 broke."))
    assert line == f"{word} 'Each' failed: item 2 broke."


def priced(price: object, currency: object = "USD") -> WorkflowEvent:
    metadata = {"total_tokens": 5, "total_price": price, "currency": currency}
    return event("node_finished", title="Ask", node_type="llm", status="succeeded", execution_metadata=metadata)


def test_prices_add_up_once_the_run_is_over() -> None:
    progress = RunProgress()
    progress.on_event(priced("0.0001"))
    progress.on_event(priced(0.0002))
    assert progress.price == {}
    progress.on_event(event("workflow_finished", status="succeeded"))
    assert progress.price == {"total_price": "0.0003", "currency": "USD"}


@pytest.mark.parametrize(
    "prices", [[priced("1", "USD"), priced("1", "EUR")], [priced("a lot")], [priced("1", None)], []]
)
def test_a_price_that_is_not_one_is_left_out(prices: list[WorkflowEvent]) -> None:
    progress = RunProgress()
    for each in prices:
        progress.on_event(each)
    progress.on_event(event("workflow_finished", status="succeeded"))
    assert progress.price == {}


@pytest.mark.parametrize("price", ["NaN", "Infinity", "-Infinity", "1e-999999", "0e-999999", "1e9", "1e999999"])
def test_a_price_out_of_range_is_left_out_or_short(price: str) -> None:
    # As decimal text it would be a megabyte.
    progress = RunProgress()
    progress.on_event(priced("1.5"))
    progress.on_event(priced(price))
    progress.on_event(event("workflow_finished", status="succeeded"))
    assert progress.price == {"total_price": "1.5", "currency": "USD"}


@pytest.mark.parametrize("price", ["999999999", "1e-29"])
def test_the_largest_and_the_smallest_price_count(price: str) -> None:
    progress = RunProgress()
    progress.on_event(priced(price))
    progress.on_event(event("workflow_finished", status="succeeded"))
    assert Decimal(progress.price["total_price"]) == Decimal(price)


@pytest.mark.parametrize("version", ["1.15.0", "1.16.1"])
def test_a_run_that_dify_rejects_is_recognized(version: str) -> None:
    progress = RunProgress()
    for each in EventStreamReader().feed(Recording.load("run_streaming_missing_input", version).body):
        progress.on_event(each)
    assert progress.was_rejected
    assert progress.final_error == "query is required in input form"


@pytest.mark.parametrize("version", ["1.12.1", "1.13.0", "1.14.2", "1.15.0", "1.16.1"])
def test_a_run_that_runs_is_never_taken_for_a_rejected_one(version: str) -> None:
    progress = RunProgress()
    for each in EventStreamReader().feed(Recording.load("run_streaming_echo", version).body):
        progress.on_event(each)
    assert not progress.was_rejected
    assert progress.final_status == "succeeded"


@pytest.mark.parametrize("version", ["1.12.1", "1.16.1"])
def test_a_run_that_fails_is_not_taken_for_a_rejected_one(version: str) -> None:
    progress = RunProgress()
    assert progress.was_rejected is False
    for each in EventStreamReader().feed(Recording.load("run_streaming_failed", version).body):
        progress.on_event(each)
    assert progress.was_rejected is False
    assert progress.final_status == "failed"
    assert progress.final_error
    assert progress.failed_node


def test_an_end_whose_status_and_error_are_no_texts_says_neither() -> None:
    progress = RunProgress()
    assert progress.on_event(event("workflow_finished", status=5, error={"a": 1})) is None
    assert (progress.final_status, progress.final_error) == (None, None)


EVENTS = ["node_started", "node_finished", "node_retry", "loop_completed", "human_input_required"]


@pytest.mark.parametrize("name", EVENTS)
def test_a_line_is_short_however_long_the_texts_of_its_event_are(name: str) -> None:
    texts = ("title", "node_type", "status", "error", "retry_index", "form_content", "node_title")
    line = RunProgress().on_event(event(name, **dict.fromkeys(texts, "x" * 10_000)))
    assert line
    assert len(line) < 600


@pytest.mark.parametrize(
    "data",
    [
        {"title": 5, "node_type": None, "status": ["x"], "elapsed_time": 10**400, "execution_metadata": "text"},
        {"title": "\x1b[31mred\nforged line", "error": {"a": 1}, "status": "failed"},
        {"expiration_time": 10**20, "form_content": ["x"], "node_title": None},
    ],
)
@pytest.mark.parametrize("name", EVENTS)
def test_a_line_is_printable_whatever_the_event_holds(name: str, data: dict[str, Any]) -> None:
    line = RunProgress().on_event(event(name, **data))
    assert line
    assert line.isprintable()
