"""Starts that may have started a run: no start is sent twice by itself, and none is looked for without end."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyError,
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunFailed,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.tasks.start import StartMemory, default_user, new_start
from tests.combinations import each_or_long
from tests.dify_stand_in import (
    API_KEY,
    PING,
    DifyStandIn,
    Fault,
    Start,
    close,
    gateway,
    lose_response,
    rejects,
    reset,
    respond,
    said,
    said_error,
    said_finished,
    without_version,
)
from tests.unit.test_contradicted_events import STARTED, on_each_client
from tests.unit.test_run_workflow import RunWorkflow, on_a_worker, on_an_event_loop
from tests.unit.test_running_task import task_of_try

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries", "short_grace", "short_reading_on")

WORDS = "1 validation error for VariableEntity"
ERROR = said_error(WORDS, 500)
LOG = "GET .*/logs"


@pytest.fixture
def default_dialect() -> str:
    """Today's Dify."""
    return "current"


@pytest.fixture(params=each_or_long([on_a_worker, on_an_event_loop], short=[on_a_worker]))
def run_workflow(request: pytest.FixtureRequest) -> RunWorkflow:
    return request.param


def posts(dify: DifyStandIn) -> int:
    return sum(request.method == "POST" and request.path.endswith("/run") for request in dify.requests)


def looks(dify: DifyStandIn) -> int:
    return sum("/logs" in request.path for request in dify.requests)


def seconds_after_the_start(dify: DifyStandIn) -> float:
    """Return how long after the (first) start Dify was last asked for something."""
    sent = next(request.at for request in dify.requests if request.method == "POST")
    return dify.requests[-1].at - sent


# --- an error before the run has a name


@on_each_client
@pytest.mark.parametrize("then", ["close", "pings", "stall"])
def test_an_error_before_the_name_is_difys_word_on_the_start(dify: DifyStandIn, start: Any, then: str) -> None:
    dify.starts.append(Start(raw=(PING, ERROR), statuses=(None,), then=then))
    with pytest.raises(DifyWorkflowRunFailed, match=WORDS) as caught:
        start()
    assert type(caught.value) is DifyWorkflowRunFailed
    assert (posts(dify), looks(dify)) == (1, 0)


@on_each_client
@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [(400, "invalid_param", DifyInputsRejected), (403, "forbidden", DifyRequestError), (404, "gone", DifyRequestError)],
)
def test_a_rejection_among_the_events_is_one(
    dify: DifyStandIn, start: Any, status: int, code: str, expected: type[DifyError]
) -> None:
    event = said_error("x is required in input form", status, code, task_id="$TASK")
    dify.starts.append(Start(raw=(PING, event), statuses=(None,), then="pings"))
    with pytest.raises(expected, match="x is required in input form") as caught:
        start()
    assert isinstance(caught.value, DifyInputsRejected) == (expected is DifyInputsRejected)
    assert (posts(dify), looks(dify)) == (1, 0)


@pytest.mark.parametrize("then", ["close", "pings", "stall"])
def test_a_start_that_dify_says_failed_has_failed(dify: DifyStandIn, run_workflow: RunWorkflow, then: str) -> None:
    dify.starts.append(Start(raw=(PING, ERROR), statuses=(None,), then=then))
    with pytest.raises(DifyWorkflowRunFailed, match=WORDS) as caught:
        run_workflow({}, "me", timeout=120)
    assert type(caught.value) is DifyWorkflowRunFailed
    assert posts(dify) == 1
    assert seconds_after_the_start(dify) < 60


@pytest.mark.parametrize("same_ids", [True, False], ids=["rejected", "ran"])
def test_the_end_that_follows_an_error_is_read(dify: DifyStandIn, run_workflow: RunWorkflow, same_ids: bool) -> None:
    ids = {"task_id": "$RUN"} if same_ids else {}
    raw = (PING, ERROR, 0.2, said("workflow_started", {}, **ids), said_finished("failed", error="no graph", **ids))
    dify.starts.append(Start(raw=raw, statuses=(None,) if same_ids else ("failed",), fields={"error": "no graph"}))
    if same_ids:
        with pytest.raises((DifyWorkflowRunFailed, DifyInputsRejected), match=f"no graph|{WORDS}"):
            run_workflow({}, "me", timeout=120)
    else:
        run = run_workflow({}, "me", timeout=120)
        assert (run.status, run.error) == ("failed", "no graph")
    assert posts(dify) == 1


def test_a_run_that_begins_after_an_error_is_followed(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    raw = (PING, ERROR, 0.3, STARTED, 0.1, said_finished("succeeded", {"a": 1}))
    dify.starts.append(Start(raw=raw, statuses=("running", "succeeded"), fields={"outputs": {"a": 1}}))
    assert run_workflow({}, "me", timeout=120).outputs == {"a": 1}
    assert posts(dify) == 1


def test_a_run_that_the_log_shows_after_an_error_is_taken(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    fields = {"outputs": {"a": 1}, "inputs": {"q": "1"}}
    dify.starts.append(Start(raw=(PING, ERROR), statuses=("running", "succeeded"), fields=fields))
    assert run_workflow({"q": "1"}, "me", timeout=120).outputs == {"a": 1}
    assert posts(dify) == 1


@pytest.mark.parametrize("failures", [2, 1000])
def test_the_look_into_the_log_after_an_error_is_repeated_for_the_grace_at_most(
    dify: DifyStandIn, run_workflow: RunWorkflow, failures: int
) -> None:
    dify.starts.append(Start(raw=(PING, ERROR), statuses=(None,)))
    dify.misbehave(*[respond(503)] * failures, only=LOG)
    with pytest.raises(DifyWorkflowRunFailed, match=WORDS):
        run_workflow({}, "me", timeout=120)
    assert posts(dify) == 1
    assert seconds_after_the_start(dify) < 60


def test_what_dify_says_before_the_name_shows_no_key_and_is_one_short_line(
    dify: DifyStandIn, run_workflow: RunWorkflow
) -> None:
    event = said_error(f"boom {API_KEY}\n2026-12-01 INFO all is well" + "x" * 100_000, 500)
    dify.starts.append(Start(raw=(PING, event), statuses=(None,)))
    with pytest.raises(DifyError) as caught:
        run_workflow({}, "me", timeout=120)
    assert "boom" in str(caught.value)
    assert API_KEY not in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 3000


# --- starts that were not accepted

NOT_ACCEPTED: dict[str, tuple[Fault, str]] = {
    "502": (gateway(502, "<html><title>502 Bad Gateway</title>nginx</html>"), "502"),
    "504": (gateway(504, "upstream request timeout", "text/plain"), "504"),
    "500": (rejects(500, "unknown", "Internal Server Error"), "Internal Server Error"),
    "reset": (reset(), "reset|Disconnected|aborted|Connection|closed"),
    "close": (close(), "reset|Disconnected|aborted|Connection|closed"),
}
on_each_failure = pytest.mark.parametrize(
    ("fault", "words"),
    [
        pytest.param(*values, id=name, marks=() if name in ("502", "reset") else pytest.mark.long)
        for name, values in NOT_ACCEPTED.items()
    ],
)


@on_each_failure
@pytest.mark.parametrize("dialect", ["1.12.1", "1.13.0", "1.16.1"], indirect=True)
def test_a_start_that_was_not_accepted_is_looked_for_during_the_grace_and_then_uncertain(
    dify: DifyStandIn, dialect: str, run_workflow: RunWorkflow, fault: Fault, words: str
) -> None:
    dify.misbehave(fault, only="POST")
    with pytest.raises(DifyWorkflowRunUncertain, match=words) as caught:
        run_workflow({}, "me", timeout=120)
    assert caught.value.user == "me"
    assert (posts(dify), len(dify.started)) == (1, 0)
    # One look before the start, and some after it.
    assert looks(dify) > 1
    assert seconds_after_the_start(dify) < 60


@on_each_failure
def test_its_run_is_taken_if_it_comes_up(
    dify: DifyStandIn, run_workflow: RunWorkflow, fault: Fault, words: str, short_grace: Callable[[float], None]
) -> None:
    short_grace(20)
    dify.slots = 0
    dify.misbehave(lose_response(fault), only="POST")
    dify.misbehave(respond(500), times=3, only=LOG)
    dify.starts.append(Start(statuses=("succeeded",), fields={"outputs": {"a": 1}, "inputs": {"q": "1"}}))

    def let_it_run() -> None:
        until = time.monotonic() + 30
        while not posts(dify) and time.monotonic() < until:
            time.sleep(0.01)
        # In a later second than the start: the log could not be read before it, so an earlier run counts for none.
        time.sleep(1.1)
        dify.slots = None

    other = threading.Thread(target=let_it_run)
    other.start()
    assert run_workflow({"q": "1"}, "me", timeout=30).outputs == {"a": 1}
    other.join()
    assert (posts(dify), len(dify.started)) == (1, 1)


def test_a_log_that_can_not_be_read_proves_nothing_and_the_first_error_is_named(
    dify: DifyStandIn, run_workflow: RunWorkflow
) -> None:
    dify.misbehave(gateway(502, "<html><title>502 Bad Gateway</title></html>"), only="POST")
    dify.misbehave_always(respond(503), only=LOG)
    with pytest.raises(DifyWorkflowRunUncertain, match="502"):
        run_workflow({}, "me", timeout=120)
    assert posts(dify) == 1
    assert seconds_after_the_start(dify) < 60


@pytest.mark.parametrize("then", ["stall", "pings"])
def test_a_start_that_was_accepted_waits_in_difys_queue_and_the_log_names_both_reasons(
    dify: DifyStandIn, then: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("airflow_provider_dify.runs.starting.QUEUE_INTERVAL", 0.3)
    dify.starts.append(Start(raw=(PING, 60.0) if then == "stall" else (PING,), statuses=(None,), then=then))
    with pytest.raises(DifyWorkflowRunUncertain):
        on_an_event_loop({}, "me", timeout=2)
    # Longer than the grace.
    assert seconds_after_the_start(dify) > 1.0
    (line, *_) = [record.getMessage() for record in caplog.records if "queue" in record.getMessage()]
    assert re.search("workers are busy, or none of them takes from this queue", line)


# --- retries of tries whose start is in doubt


@pytest.mark.parametrize(
    ("dialect", "starts_again"),
    [("1.12.1", True), ("1.13.0", False), ("1.16.1", False)],
    indirect=["dialect"],
)
def test_a_retry_sends_the_start_of_a_killed_try_again_only_where_runs_do_not_queue(
    dify: DifyStandIn, dialect: str, starts_again: bool
) -> None:
    with task_of_try(2, after=killed_while_it_started()) as task:
        if starts_again:
            task.execute()
        else:
            with pytest.raises(DifyWorkflowRunUncertain, match=r"earlier try"):
                task.execute()
    assert posts(dify) == len(dify.started) == int(starts_again)
    assert looks(dify) > 1


def test_nor_where_the_version_is_not_known(dify: DifyStandIn) -> None:
    dify.misbehave_always(without_version())
    with task_of_try(2, after=killed_while_it_started()) as task, pytest.raises(DifyWorkflowRunUncertain):
        task.execute()
    assert posts(dify) == 0


@pytest.mark.parametrize("dialect", ["1.13.0", "1.16.1"], indirect=True)
def test_a_retry_starts_again_where_that_was_asked_for(dify: DifyStandIn, dialect: str) -> None:
    with task_of_try(2, after=killed_while_it_started(), restart_lost_runs=True) as task:
        task.execute()
    assert (posts(dify), len(dify.started)) == (1, 1)


@pytest.mark.parametrize("fault", [respond(503), gateway(404), reset()], ids=["503", "gateway", "reset"])
def test_but_not_if_a_look_into_the_log_has_failed(dify: DifyStandIn, fault: Fault) -> None:
    with task_of_try(2, after=killed_while_it_started(), restart_lost_runs=True) as task:
        served = iter(range(1000))

        async def fail_for_a_while(request: Any) -> Any:
            # More than once: what a reset connection was asked is asked again at once.
            return await (fault(request) if 1 <= next(served) <= 4 else dify.respond_to(request))

        dify.misbehave_always(fail_for_a_while, only=LOG)
        with pytest.raises(DifyError):
            task.execute()
    assert posts(dify) == 0


def test_the_run_of_a_killed_try_that_comes_up_within_the_grace_is_taken(dify: DifyStandIn) -> None:
    first = killed_while_it_started()
    with task_of_try(2, after=first, not_found_grace=20.0) as task:
        appear = threading.Timer(0.5, dify.add_run, ("running",), {"user": first.task_start.user})
        appear.start()
        run_id = task.execute()
        appear.join()
    assert (run_id, posts(dify)) == (next(iter(dify.runs)), 0)


def killed_while_it_started() -> Any:
    """Return a first try that was killed when it had just sent its start."""
    with task_of_try(1) as first:
        ti: Any = first.context["ti"]
        first._start = new_start(ti, None, {"q": "1"}, (), time.time())
        StartMemory(first.context).save(first._start)
        return first


# --- rows of the log without a run


@pytest.mark.parametrize(("age", "is_deleted"), [(600, True), (330, True), (60, False)])
def test_a_row_whose_run_is_gone_for_five_minutes_blocks_no_retry(
    dify: DifyStandIn, age: int, is_deleted: bool
) -> None:
    with task_of_try(1, has_memory=False) as first:
        user = default_user(first.context["ti"], 1)
        gone = dify.add_run("running", user=user, created_at=int(time.time()) - age)
        dify.runs[gone].has_no_record = True
    with task_of_try(2, after=first, age=3600.0, max_consecutive_failures=1) as task:
        if is_deleted:
            assert task.execute() == dify.started[0].workflow_run_id
        else:
            with pytest.raises(DifyConnectionError, match="no record"):
                task.execute()
    assert len(dify.started) == int(is_deleted)


# --- logs that are slow


@pytest.fixture
def slow_log(dify: DifyStandIn, dify_connection: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the log take a second for each page, and the connection have a timeout of 0.4."""
    fields = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": {"timeout": 0.4}}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))

    async def slow(request: Any) -> Any:
        await asyncio.sleep(1.0)
        return await dify.respond_to(request)

    dify.misbehave_always(slow, only=LOG)


@pytest.mark.usefixtures("slow_log")
def test_a_retry_has_time_for_a_slow_log(dify: DifyStandIn) -> None:
    with task_of_try(1, has_memory=False) as first:
        dify.starts.append(Start(statuses=("running",), cut="workflow_started"))
        # The first try's own look doesn't have to succeed.
        first.execute()
    with task_of_try(2, after=first) as second:
        assert second.execute() == dify.started[0].workflow_run_id
    assert len(dify.started) == 1


@pytest.mark.usefixtures("slow_log")
def test_but_no_time_without_end(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_dify.tasks.start.SECONDS_FOR_LOG", 0.6)
    with task_of_try(1, has_memory=False) as first:
        dify.starts.append(Start(statuses=("running",), cut="workflow_started"))
        first.execute()
    began = time.monotonic()
    with task_of_try(2, after=first, max_consecutive_failures=1) as second:
        with pytest.raises(
            DifyConnectionError, match="can't tell whether a run of an earlier one still runs"
        ) as caught:
            second.execute()
        # The next try looks again.
        assert type(caught.value) is DifyConnectionError
    assert time.monotonic() - began < 60
    assert posts(dify) == 1


@pytest.mark.usefixtures("slow_log")
def test_a_retry_of_a_start_that_was_under_way_has_it_too(dify: DifyStandIn) -> None:
    with (
        task_of_try(2, after=killed_while_it_started()) as task,
        pytest.raises(DifyWorkflowRunUncertain, match="earlier try"),
    ):
        task.execute()
    assert posts(dify) == 0
