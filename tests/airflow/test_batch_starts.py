"""What a batch does with a start that goes wrong: it pays for no row twice, and the other rows go on."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from airflow_provider_dify.exceptions import DifyBatchFailed, DifyConnectionError, DifyWorkflowRunTimeout
from tests.airflow.airflow_runs import posts
from tests.airflow.test_batch_in_airflow import lines_of, numbered, once, quick, run_batch  # noqa: F401
from tests.combinations import pairs
from tests.dify_stand_in import API_KEY, DifyStandIn, Fault, lose_response, reset, respond, stall

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

QUEUING = pytest.mark.parametrize("dialect", ["1.16.1"], indirect=True)
GRACE = 0.4
EACH_KIND = pytest.mark.parametrize("dialect", ["1.12.1", "1.16.1"], indirect=True)


def take(dify: DifyStandIn) -> Fault:
    """Respond as Dify does."""

    async def fault(request: web.Request) -> web.StreamResponse:
        return await dify.respond_to(request)

    return fault


@contextmanager
def after(seconds: float, is_met: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something so many seconds after something is so, while a batch runs."""

    def act_late() -> None:
        time.sleep(seconds)
        act()

    with once(is_met, act_late):
        yield


# --- a start whose response gets lost


@EACH_KIND
def test_a_lost_start_is_not_sent_again_although_the_log_is_away_for_longer_than_the_grace(
    dify: DifyStandIn, dialect: str
) -> None:
    dify.misbehave(lose_response(respond(504)), only="POST .*/run")
    dify.misbehave_always(respond(500), only="GET .*/logs")
    with after(3 * GRACE, lambda: posts(dify) > 0, lambda: dify.misbehave_always(None)):
        result = run_batch(inputs=numbered(3), not_found_grace=GRACE)
    assert result.state == "success"
    assert {row["status"] for row in result.received["results"]} == {"succeeded"}
    assert posts(dify) == len(dify.started) == 3


@QUEUING
def test_a_lost_start_that_dify_has_queued_is_taken_up_at_the_end_of_the_batch(dify: DifyStandIn, dialect: str) -> None:
    dify.slots = 0
    dify.misbehave(lose_response(reset()), only="POST .*/run")

    def serve() -> None:
        dify.slots = 4

    with after(3 * GRACE, lambda: len(dify.started) == 4, serve):
        result = run_batch(inputs=numbered(4), max_active_runs=4, not_found_grace=GRACE)
    assert result.state == "success"
    assert {row["status"] for row in result.received["results"]} == {"succeeded"}
    assert posts(dify) == len(dify.started) == 4


@QUEUING
def test_a_lost_start_that_dify_has_queued_gives_its_place_to_other_rows(dify: DifyStandIn, dialect: str) -> None:
    dify.misbehave(stall(30), only="POST .*/run")
    result = run_batch(inputs=numbered(3), max_active_runs=1, max_failed_runs=1, not_found_grace=GRACE, **SHORT)
    assert result.state == "success"
    assert [row["status"] for row in result.received["results"]] == ["failed", "succeeded", "succeeded"]
    assert posts(dify) == 3


# The connection of these has a timeout of a second.
SHORT: dict[str, Any] = {"dify_conn_id": "dify_short"}


@pytest.fixture(autouse=True)
def short_timeout(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": {"timeout": 1}}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_SHORT", json.dumps(fields))


@EACH_KIND
def test_a_lost_start_whose_run_never_comes_up_is_a_failed_row_that_may_run_still(
    dify: DifyStandIn, dialect: str, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    dify.misbehave(take(dify), respond(502, "<html>nginx", content_type="text/html"), only="POST .*/run")
    result = run_batch(
        inputs=numbered(8), max_active_runs=1, not_found_grace=GRACE, run_retries=2, output_path=str(output)
    )
    assert result.states["run"] == "failed"
    assert isinstance(result.raised["run"][0], DifyBatchFailed)
    assert "rows were not run" not in str(result.raised["run"][0])
    results = lines_of(output)
    assert [row["status"] for row in results] == ["succeeded", "failed", *["succeeded"] * 6]
    lost = results[1]
    assert (lost["workflow_run_id"], lost["attempts"]) == (None, 1)
    assert "502" in lost["error"]
    assert "it may still run, and be paid for" in lost["error"]
    assert posts(dify) == 8


@QUEUING
def test_a_lost_start_is_sent_again_after_the_grace_if_that_is_asked_for(dify: DifyStandIn, dialect: str) -> None:
    dify.misbehave(respond(502), times=2, only="POST .*/run")
    result = run_batch(inputs=numbered(4), not_found_grace=GRACE, run_retries=1, restart_lost_runs=True)
    assert result.state == "success"
    results = result.received["results"]
    assert {row["status"] for row in results} == {"succeeded"}
    assert sorted(row["attempts"] for row in results) == [1, 1, 2, 2]
    assert posts(dify) == 6
    assert len({started.user for started in dify.started}) == 4


@QUEUING
@pytest.mark.parametrize("why", ["no retry", "log away", "no log"])
def test_a_lost_start_is_not_sent_again_on_request_where_its_run_may_have_been_missed(
    dify: DifyStandIn, dialect: str, why: str
) -> None:
    dify.misbehave(respond(502), only="POST .*/run")
    if why == "log away":
        dify.misbehave(respond(503), only="GET .*/logs")
    elif why == "no log":
        dify.misbehave_always(respond(400, '{"code": "x", "message": "no log", "status": 400}'), only="GET .*/logs")
    result = run_batch(
        inputs=numbered(2),
        max_failed_runs=1,
        not_found_grace=GRACE,
        run_retries=0 if why == "no retry" else 2,
        restart_lost_runs=True,
    )
    assert result.state == "success"
    assert sorted(row["status"] for row in result.received["results"]) == ["failed", "succeeded"]
    assert posts(dify) == 2


@QUEUING
@pytest.mark.parametrize("comes_up", [True, False])
def test_a_start_that_dify_has_accepted_is_waited_for_and_never_sent_again(
    dify: DifyStandIn, dialect: str, comes_up: bool
) -> None:
    # Dify ends the stream of a start that is queued for 300 seconds.
    dify.slots = 0
    dify.silence_limit = 0.2

    def serve() -> None:
        dify.slots = 4 if comes_up else 0

    with after(4 * GRACE, lambda: len(dify.started) == 2, serve):
        result = run_batch(
            inputs=numbered(2),
            not_found_grace=GRACE,
            run_retries=2,
            restart_lost_runs=True,
            timeout=60 if comes_up else 2,
        )
    assert posts(dify) == 2
    if comes_up:
        assert {row["status"] for row in result.received["results"]} == {"succeeded"}
    else:
        assert isinstance(result.raised["run"][0], DifyWorkflowRunTimeout)


def test_a_dify_that_loses_every_start_ends_the_try_before_all_rows_are_lost(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.batch.running._MAX_LOST_IN_A_ROW", 3)
    output = tmp_path / "results.jsonl"
    dify.misbehave_always(respond(500, '{"code": "unknown", "message": "no broker", "status": 500}'), "POST .*/run")

    result = run_batch(
        inputs=numbered(40), max_active_runs=2, max_failed_runs=6, not_found_grace=0.1, output_path=str(output)
    )
    assert result.states["run"] == "failed"
    (error,) = result.raised["run"]
    assert isinstance(error, DifyConnectionError)
    assert "starts got lost like this, so no more are sent" in str(error)
    assert "no broker" in str(error)
    assert 4 <= posts(dify) <= 6
    assert [row["index"] for row in lines_of(output)] == list(range(posts(dify)))
    assert {row["status"] for row in lines_of(output)} == {"failed"}


def test_the_retry_of_a_batch_sends_no_lost_start_again(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.batch.running._MAX_LOST_IN_A_ROW", 2)
    output = tmp_path / "results.jsonl"
    dify.misbehave(respond(502), times=3, only="POST .*/run")
    result = run_batch(
        inputs=numbered(10),
        max_active_runs=1,
        max_failed_runs=3,
        not_found_grace=0.1,
        output_path=str(output),
        retries=1,
        retry_delay=0.0,
    )
    assert (result.state, result.tries["run"]) == ("success", 2)
    assert [row["status"] for row in lines_of(output)] == ["failed"] * 3 + ["succeeded"] * 7
    assert posts(dify) == 10


def test_a_log_that_is_slower_than_the_connections_timeout_keeps_no_retry_from_its_rows(
    dify: DifyStandIn, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"

    async def slowly(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1.5)
        return await dify.respond_to(request)

    # Dify is away when the third row's run is asked for; the retry reads the log.
    dify.misbehave(take(dify), take(dify), stream(STARTED), only="POST .*/run")
    dify.add_run("running", "succeeded", run_id=RUN)
    dify.misbehave(respond(503), respond(503), only=f"GET .*/({RUN}|info)")
    dify.misbehave_always(slowly, "GET .*/logs")
    result = run_batch(
        inputs=numbered(5),
        max_active_runs=1,
        max_consecutive_failures=0,
        not_found_grace=GRACE,
        output_path=str(output),
        retries=1,
        retry_delay=0.0,
        **SHORT,
    )
    assert (result.state, result.tries["run"]) == ("success", 2)
    assert {row["status"] for row in lines_of(output)} == {"succeeded"}


# --- a start that something in front of Dify refuses

GATEWAY = respond(403, "error code: 1010", content_type="text/plain")


def test_a_start_that_a_gateway_refuses_is_sent_again_and_nothing_is_paid_twice(dify: DifyStandIn) -> None:
    dify.misbehave(*[take(dify)] * 6, GATEWAY, only="POST .*/run")
    result = run_batch(inputs=numbered(12), max_active_runs=4)
    assert result.state == "success"
    assert {row["status"] for row in result.received["results"]} == {"succeeded"}
    assert (posts(dify), len(dify.started)) == (13, 12)
    assert len({started.user for started in dify.started}) == 12


def test_a_row_that_a_gateway_always_refuses_fails_alone(dify: DifyStandIn) -> None:
    async def refuse(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await (GATEWAY(request) if body["inputs"]["n"] == 3 else dify.respond_to(request))

    dify.run_duration = 0.05
    dify.misbehave_always(refuse, "POST .*/run")
    result = run_batch(inputs=numbered(60), max_active_runs=2, max_failed_runs=1)
    assert result.state == "success"
    (failed,) = [row for row in result.received["results"] if row["status"] != "succeeded"]
    assert (failed["index"], failed["workflow_run_id"], failed["attempts"]) == (3, None, 0)
    assert "error code: 1010" in failed["error"]
    assert len(dify.started) == 59


def test_a_gateway_that_refuses_every_start_ends_the_try(dify: DifyStandIn) -> None:
    dify.misbehave_always(GATEWAY, "POST .*/run")
    result = run_batch(inputs=numbered(5), max_active_runs=2, max_failed_runs=5)
    assert isinstance(result.raised["run"][0], DifyConnectionError)
    assert dify.started == []


# --- what the events say

RUN, TASK = str(uuid.uuid4()), str(uuid.uuid4())


def stream(*events: dict[str, Any] | str, pings: float = 0.0) -> Fault:
    """Respond with an event stream; a text is the data of an event as it is. Pings may follow for some seconds."""

    async def fault(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Type": "text/event-stream", "X-Version": "1.16.1"}
        response = web.StreamResponse(headers=headers)
        await response.prepare(request)
        for event in events:
            data = event if isinstance(event, str) else json.dumps(event)
            await response.write(f"data: {data}\n\n".encode())
        until = time.monotonic() + pings
        while time.monotonic() < until:
            await response.write(b"event: ping\n\n")
            await asyncio.sleep(0.1)
        return response

    return fault


def event(name: str, **data: Any) -> dict[str, Any]:
    return {"event": name, "task_id": TASK, "workflow_run_id": RUN, "data": {"id": RUN, **data}}


def finished(status: str, error: str | None = None) -> dict[str, Any]:
    outputs = {"answer": "ok"} if status == "succeeded" else {}
    counts = {"total_tokens": 5, "total_steps": 3, "elapsed_time": 0.5}
    return event("workflow_finished", status=status, outputs=outputs, error=error, **counts)


STARTED = event("workflow_started", inputs={})


@pytest.mark.parametrize(("pings", "run_retries"), pairs([0.0, 20.0], [0, 1]))
def test_an_error_before_the_run_has_a_name_is_one_start_that_failed(
    dify: DifyStandIn, run_retries: int, pings: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.api.run_stream.SECONDS_AFTER_ERROR", 0.3)
    said = {"event": "error", "message": "1 validation error for VariableEntity", "status": 500}
    dify.misbehave(stream(said, pings=pings), only="POST .*/run")
    result = run_batch(inputs=numbered(3), max_active_runs=1, max_failed_runs=1, run_retries=run_retries)
    assert result.state == "success"
    first, *others = result.received["results"]
    assert {row["status"] for row in others} == {"succeeded"}
    assert posts(dify) == 3 + run_retries
    if run_retries:
        assert (first["status"], first["attempts"]) == ("succeeded", 2)
    else:
        assert (first["status"], first["workflow_run_id"]) == ("failed", None)
        assert first["error"].startswith("1 validation error for VariableEntity")


@pytest.mark.parametrize("code", ["invalid_param", "app_unavailable"])
def test_a_start_that_an_error_event_rejects_is_sent_once(dify: DifyStandIn, code: str) -> None:
    said = {"event": "error", "task_id": TASK, "workflow_run_id": None, "code": code, "status": 400, "message": "no x"}
    dify.misbehave(stream(said), only="POST .*/run")
    result = run_batch(inputs=numbered(2), max_active_runs=1, max_failed_runs=1, run_retries=3)
    assert result.state == "success"
    rejected, good = result.received["results"]
    assert (rejected["status"], rejected["attempts"], good["status"]) == ("failed", 0, "succeeded")
    assert rejected["error"].startswith("no x")
    assert posts(dify) == 2


@pytest.mark.parametrize(
    ("record", "status"), pairs(["running", "unknown", "broken"], ["succeeded", "failed", "stopped"])
)
def test_the_events_count_where_the_record_contradicts_them(dify: DifyStandIn, status: str, record: str) -> None:
    error = None if status == "succeeded" else "Stopped by user." if status == "stopped" else "no such model"
    if record != "unknown":
        dify.add_run("running", run_id=RUN)
    if record == "broken":
        dify.misbehave_always(respond(500), only=f"GET .*/{RUN}")
    dify.misbehave(stream(STARTED, finished(status, error)), only="POST .*/run")
    result = run_batch(inputs=numbered(3), max_active_runs=1, max_failed_runs=1, not_found_grace=GRACE)
    assert result.state == "success"
    first, *others = result.received["results"]
    assert (first["status"], first["error"], first["workflow_run_id"]) == (status, error, RUN)
    assert first["outputs"] == ({"answer": "ok"} if status == "succeeded" else {})
    assert {row["status"] for row in others} == {"succeeded"}
    assert posts(dify) == 3
    assert dify.stopped == []


def test_the_first_event_with_both_ids_names_the_run(dify: DifyStandIn) -> None:
    node = event("node_started", node_id="1", title="Ask", node_type="llm")
    dify.misbehave(stream(node, "[DONE]", finished("succeeded")), only="POST .*/run")
    result = run_batch(inputs=numbered(2), max_active_runs=1)
    assert result.state == "success"
    assert result.received["results"][0]["outputs"] == {"answer": "ok"}
    assert posts(dify) == 2
    assert not any("/workflows/run/" in request.path for request in dify.requests)


def test_a_gateways_responses_to_polls_end_no_row(dify: DifyStandIn) -> None:
    dify.misbehave(stream(STARTED), only="POST .*/run")
    dify.add_run("running", "running", "succeeded", run_id=RUN, outputs={"answer": "ok"})
    page = '{"message": "no Route matched with those values"}'
    kong = respond(404, page, headers={"Server": "kong/3.3.0"})
    dify.misbehave(take(dify), kong, GATEWAY, respond(404), only=f"GET .*/{RUN}")
    result = run_batch(inputs=numbered(2), max_active_runs=1)
    assert result.state == "success"
    assert result.received["results"][0]["outputs"] == {"answer": "ok"}
    assert posts(dify) == 2
    assert dify.stopped == []
