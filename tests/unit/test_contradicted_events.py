"""What the events of a run say counts: where its record contradicts them, where some are missing or can't be read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.api.models import WorkflowRunStatus
from airflow_provider_dify.exceptions import DifyInputsRejected
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.combinations import pairs
from tests.dify_stand_in import (
    API_KEY,
    PING,
    DifyStandIn,
    Fault,
    Start,
    kong_404,
    node_finished,
    rejects,
    reset,
    respond,
    said,
    said_error,
    said_finished,
)
from tests.unit.test_run_workflow import RunWorkflow, on_a_worker, on_an_event_loop

OUTPUTS = {"answer": "héllo 你好 🎉"}
STARTED = said("workflow_started", {"inputs": {"sys.user_id": "me"}})

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries", "short_grace", "short_reading_on")


@pytest.fixture
def default_dialect() -> str:
    """Today's Dify."""
    return "current"


@pytest.fixture(params=[on_a_worker, on_an_event_loop])
def run_workflow(request: pytest.FixtureRequest) -> RunWorkflow:
    return request.param


def start_on_a_worker(**arguments: Any) -> tuple[str, str, list[str]]:
    with DifyHook(retry_limit=0) as hook, hook.start_workflow_run({}, "me", **arguments) as run:
        return run.workflow_run_id, run.task_id, [event.name for event in run]


def start_on_an_event_loop(**arguments: Any) -> tuple[str, str, list[str]]:
    async def start() -> tuple[str, str, list[str]]:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run({}, "me", **arguments) as run:
            return run.workflow_run_id, run.task_id, [event.name async for event in run]

    return asyncio.run(start())


BOTH_CLIENTS = [start_on_a_worker, start_on_an_event_loop]
on_each_client = pytest.mark.parametrize("start", BOTH_CLIENTS)


# --- records that contradict the events


def stays_running(dify: DifyStandIn) -> tuple[str | None, ...]:
    return ("running",)


def stays_unknown(dify: DifyStandIn) -> tuple[str | None, ...]:
    return (None,)


def lost(dify: DifyStandIn) -> tuple[str | None, ...]:
    return ("running", None)


def record_fails(fault: Fault, name: str) -> Any:
    def record(dify: DifyStandIn) -> tuple[str | None, ...]:
        dify.misbehave_always(fault, only="GET .*/workflows/run/")
        return ("running",)

    record.__name__ = name
    return record


RECORDS = [
    stays_running,
    stays_unknown,
    lost,
    record_fails(rejects(500, "unknown", "Internal Server Error"), "500"),
    record_fails(respond(502, "<html>"), "502"),
    record_fails(kong_404(), "gateway"),
    record_fails(reset(), "reset"),
]
SUCCEEDED = (PING, STARTED, said_finished("succeeded", OUTPUTS))


@pytest.mark.parametrize(("record", "then"), pairs(RECORDS, ["close", "pings"]))
def test_a_run_that_succeeded_by_its_events_is_returned_with_its_outputs_whatever_its_record_says(
    dify: DifyStandIn, run_workflow: RunWorkflow, record: Any, then: str
) -> None:
    dify.starts.append(Start(raw=SUCCEEDED, statuses=record(dify), then=then))
    run = run_workflow({}, "me", timeout=60)
    assert (run.status, run.outputs) == (WorkflowRunStatus.SUCCEEDED, OUTPUTS)
    assert (run.id, run.total_tokens, run.total_steps) == (dify.started[0].workflow_run_id, 7, 2)
    assert run.is_over
    assert dify.stopped == []


@pytest.mark.parametrize(
    ("said_status", "outputs", "error", "status", "record"),
    pairs(
        [
            pytest.param("failed", {}, "no such model", "failed", id="failed"),
            pytest.param("stopped", {}, "Stopped by user.", "stopped", id="stopped"),
            pytest.param("partial-succeeded", OUTPUTS, None, "partial-succeeded", id="partial"),
            # A failure that a stop caused is a stop.
            pytest.param("failed", {}, "Aborted: User requested stop", "stopped", id="aborted"),
        ],
        [stays_running, stays_unknown, lost],
    ),
)
def test_a_run_that_ended_otherwise_by_its_events_is_returned_too(
    dify: DifyStandIn,
    run_workflow: RunWorkflow,
    said_status: str,
    outputs: dict[str, Any],
    error: str | None,
    status: str,
    record: Any,
) -> None:
    dify.starts.append(
        Start(raw=(PING, STARTED, said_finished(said_status, outputs, error=error)), statuses=record(dify))
    )
    run = run_workflow({}, "me", timeout=60)
    assert (run.status, run.error, run.outputs) == (status, error, outputs)
    assert isinstance(run.status, WorkflowRunStatus)


def test_the_events_count_only_after_the_grace(
    dify: DifyStandIn, run_workflow: RunWorkflow, short_grace: Callable[[float], None]
) -> None:
    # The record is a second late: it has more to say than the event.
    short_grace(30)
    statuses = (*["running"] * 10, "succeeded")
    failed = (PING, STARTED, said_finished("failed", error="no such model"))
    dify.starts.append(Start(raw=failed, statuses=statuses, fields={"outputs": {"late": 1}}))
    assert run_workflow({}, "me", timeout=60).outputs == {"late": 1}


def test_they_count_when_the_time_is_over_before_the_grace(
    dify: DifyStandIn, run_workflow: RunWorkflow, short_grace: Callable[[float], None]
) -> None:
    short_grace(600)
    dify.starts.append(Start(raw=SUCCEEDED, statuses=("running",)))
    assert run_workflow({}, "me", timeout=3).outputs == OUTPUTS


def test_a_run_that_is_only_silent_is_not_over(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    # No event has said that it ended.
    dify.starts.append(Start(raw=(STARTED,), statuses=(*["running"] * 15, "succeeded")))
    assert run_workflow({}, "me", timeout=60).status == "succeeded"


@pytest.mark.parametrize("error", ["Aborted: User requested stop", "Aborted: user requested stop."])
def test_a_record_that_failed_because_of_a_stop_counts_as_stopped(dify: DifyStandIn, error: str) -> None:
    run_id = dify.add_run("failed", error=error)
    with DifyHook() as hook:
        run = hook.get_workflow_run(run_id)
        assert (run.status, run.error) == (WorkflowRunStatus.STOPPED, error)
        assert hook.get_workflow_run(dify.add_run("failed", error="no such model")).status == "failed"


# --- starts without workflow_started

FIRST: dict[str, bytes] = {
    "node_started": said("node_started", {"title": "Ask", "node_type": "llm"}),
    "node_finished": said("node_finished", node_finished("Ask")["data"]),
    "text_chunk": said("text_chunk", {"text": "h"}),
    "human_input_required": said("human_input_required", {"node_title": "Ask"}),
}


LAST = {"workflow_finished": said_finished("succeeded", OUTPUTS), "workflow_paused": said("workflow_paused")}


@on_each_client
@pytest.mark.parametrize(
    ("name", "ping"), pairs([*FIRST, *LAST], [pytest.param(PING, id="ping"), pytest.param(b"", id="no ping")])
)
def test_the_first_event_with_both_ids_names_the_run_and_is_not_lost(
    dify: DifyStandIn, start: Any, name: str, ping: bytes
) -> None:
    raw = (ping, LAST[name]) if name in LAST else (ping, FIRST[name], 0.1, said_finished("succeeded"))
    dify.starts.append(Start(raw=raw, statuses=("succeeded",), then="pings" if name in LAST else "close"))
    run_id, task_id, names = start()
    (started,) = dify.started
    assert (run_id, task_id) == (started.workflow_run_id, started.task_id)
    assert [each for each in names if each != "ping"] == ([name] if name in LAST else [name, "workflow_finished"])


def test_an_error_with_both_ids_names_the_run_whose_record_decides(
    dify: DifyStandIn, run_workflow: RunWorkflow
) -> None:
    error = said_error("boom", 500, workflow_run_id="$RUN", task_id="$TASK")
    statuses = ("running", "running", "succeeded")
    dify.starts.append(Start(raw=(PING, error), statuses=statuses, fields={"outputs": OUTPUTS}, then="pings"))
    run = run_workflow({}, "me", timeout=60)
    assert (run.id, run.outputs) == (dify.started[0].workflow_run_id, OUTPUTS)


@on_each_client
def test_an_event_with_one_id_names_nothing(dify: DifyStandIn, start: Any) -> None:
    raw = (
        said("node_started", workflow_run_id=None),
        said("node_started", task_id=None),
        said("workflow_started", task_id=""),
        STARTED,
        said_finished("succeeded"),
    )
    dify.starts.append(Start(raw=raw, statuses=("succeeded",)))
    run_id, task_id, names = start()
    assert (run_id, task_id) == (dify.started[0].workflow_run_id, dify.started[0].task_id)
    assert names[-1] == "workflow_finished"


@pytest.mark.parametrize("name", [*FIRST, "workflow_finished"])
def test_a_run_without_its_first_event_is_followed_to_its_end(
    dify: DifyStandIn, run_workflow: RunWorkflow, name: str
) -> None:
    finished = said_finished("succeeded", OUTPUTS)
    raw = (PING, *([FIRST[name], 0.2] if name in FIRST else []), finished)
    dify.starts.append(Start(raw=raw, statuses=("running", "succeeded"), fields={"outputs": OUTPUTS}, then="pings"))
    run = run_workflow({}, "me", timeout=60)
    assert (run.id, run.outputs) == (dify.started[0].workflow_run_id, OUTPUTS)


@pytest.mark.parametrize("first", ["", "workflow_started"])
def test_a_run_whose_task_has_its_own_id_was_rejected(dify: DifyStandIn, run_workflow: RunWorkflow, first: str) -> None:
    started = said("workflow_started", {"inputs": {"query": ""}}, task_id="$RUN") if first else b""
    finished = said_finished("failed", error="query is required in input form", task_id="$RUN")
    dify.starts.append(Start(raw=(PING, started, finished), statuses=(None,)))
    with pytest.raises(DifyInputsRejected, match="query is required in input form"):
        run_workflow({}, "me", timeout=60)


# --- events that can't be read

UNREADABLE = {
    "done": b"data: [DONE]\n\n",
    "broken": b'data: {"event": "node_sta\n\n',
    "list": b"data: [1]\n\n",
    "number": b"data: 5\n\n",
    "null": b"data: null\n\n",
    "no event": b'data: {"choices": []}\n\n',
    "event of a wrong type": b'data: {"event": 5}\n\n',
    "no UTF-8": b"data: \xff\xfe\n\n",
    "nested": b"data: " + b"[" * 100_000 + b"\n\n",
    "key": b"data: {" + API_KEY.encode() + b"\n\n",
}


@pytest.mark.parametrize(("name", "start"), pairs(list(UNREADABLE), BOTH_CLIENTS))
def test_an_event_that_cannot_be_read_is_left_out(
    dify: DifyStandIn, start: Any, name: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    odd = UNREADABLE[name]
    raw = (PING, odd, STARTED, odd, FIRST["node_started"], odd, said_finished("succeeded"))
    dify.starts.append(Start(raw=raw, statuses=("succeeded",)))
    run_id, _, names = start()
    assert run_id == dify.started[0].workflow_run_id
    assert names == ["node_started", "workflow_finished"]
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    printed = "".join(capfd.readouterr())
    assert warnings or "event" in printed
    assert all(line.isprintable() and len(line) < 1000 for line in warnings)
    assert API_KEY not in printed + caplog.text
