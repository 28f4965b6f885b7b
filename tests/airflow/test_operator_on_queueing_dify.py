"""What the operator does on servers where runs queue, starts get lost and inputs are rejected."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from tests.airflow.airflow_runs import DagRunResult, run_operator
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Fault,
    Start,
    close,
    form_field,
    lose_response,
    pings_only,
    quota_reached,
    reset,
    respond,
    stall,
    too_many_requests,
)
from tests.standstill import Standstill

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

QUEUEING = ("1.13.0", "1.14.2", "1.15.0", "1.16.1", "1.17")
WAYS: dict[str, dict[str, Any]] = {"worker": {}, "deferrable": {"deferrable": True}}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Scaled down as the stand-in's runs are.
    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_BEFORE_DEFERRAL", 0.3)
    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_BEFORE_QUEUED", 0.1)
    return WAYS[request.param]


@pytest.fixture
def dify(request: pytest.FixtureRequest) -> Iterator[DifyStandIn]:
    """A stand-in in the dialect that the test asks for, by default today's."""
    version = request.getfixturevalue("dialect") if "dialect" in request.fixturenames else "current"
    with DifyStandIn(version) as server:
        yield server


def error_of(result: DagRunResult) -> BaseException:
    """Return what the task failed with, once it is sure that it was tried once."""
    assert result.states["run"] == "failed"
    assert result.tries["run"] == 1
    (error,) = result.raised["run"]
    return error


def posts(dify: DifyStandIn) -> int:
    return sum(request.method == "POST" and request.path.endswith("/run") for request in dify.requests)


@pytest.mark.parametrize("silence_limit", [300.0, 0.5], ids=["the stream stays open", "the server closes the stream"])
def test_a_start_that_is_queued_succeeds_once_a_worker_is_free(
    dify: DifyStandIn, dialect: str, way: dict[str, Any], silence_limit: float
) -> None:
    if dialect not in QUEUEING:
        pytest.skip("runs do not queue on this version")
    dify.slots = 0
    dify.silence_limit = silence_limit
    free_later(dify, seconds=2.0)
    result = run_operator(retries=2, retry_delay=0, timeout=30, **way)
    assert result.state == "success"
    assert result.tries["run"] == 1
    assert len(dify.started) == 1
    assert result.xcoms["run"]["workflow_run_id"] == dify.log[0].id
    assert dify.stopped == []


def free_later(dify: DifyStandIn, *, seconds: float) -> None:
    """Let the stand-in have a free worker, so many seconds after its first start."""

    async def free(request: Any) -> Any:
        if request.method == "POST" and request.path.endswith("/run"):
            dify._loop.call_later(seconds, setattr, dify, "slots", 4)
        return await dify.respond_to(request)

    dify.misbehave_always(free, only="POST .*/run")


@pytest.mark.parametrize(
    "fault",
    [lose_response(reset()), lose_response(close()), lose_response(respond(502))],
    ids=["reset", "close", "502"],
)
def test_a_start_whose_response_is_lost_is_found_in_the_log(
    dify: DifyStandIn, dialect: str, way: dict[str, Any], fault: Fault
) -> None:
    dify.misbehave(fault, only="POST .*/run")
    result = run_operator(retries=2, retry_delay=0, timeout=30, **way)
    assert result.state == "success"
    assert result.tries["run"] == 1
    assert len(dify.started) == posts(dify) == 1


@pytest.mark.parametrize(
    ("inputs", "named"),
    [({}, "query"), ({"query": 5}, "query"), ({"query": "a", "choice": "c"}, "choice")],
    ids=["missing", "of a wrong type", "no option"],
)
def test_rejected_inputs_fail_within_a_second_name_the_input_and_start_nothing(
    dify: DifyStandIn, dialect: str, way: dict[str, Any], inputs: dict[str, Any], named: str, standstill: Standstill
) -> None:
    dify.user_input_form = [form_field("query", required=True), form_field("choice", "select", options=("a", "b"))]
    result = run_operator(inputs=inputs, retries=2, retry_delay=0, **way)
    error = error_of(result)
    assert type(error) is DifyInputsRejected
    assert named in str(error)
    assert dify.started == []
    assert posts(dify) == 0
    assert dify.requests[-1].at - dify.requests[0].at - standstill.seconds < 1


def in_the_queue(dify: DifyStandIn) -> None:
    dify.slots = 0


def on_pings(dify: DifyStandIn) -> None:
    dify.misbehave(pings_only(0.1), only="POST .*/run")


def on_a_silent_stream(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running",), cut=2000, then="stall"))


def on_a_silent_response(dify: DifyStandIn) -> None:
    dify.misbehave(stall(10), only="POST .*/run")


def on_polls(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running",), cut=2000, then="close"))


@pytest.mark.parametrize(
    "phase",
    [in_the_queue, on_pings, on_a_silent_stream, on_a_silent_response, on_polls],
    ids=lambda phase: phase.__name__,
)
def test_the_timeout_is_kept_within_a_second(
    dify: DifyStandIn, way: dict[str, Any], phase: Any, monkeypatch: pytest.MonkeyPatch, standstill: Standstill
) -> None:
    from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
    from airflow_provider_dify.tasks.task_try import RunningTask

    # Between the start of the task and its failure, however often it was deferred.
    times: list[float] = []
    execute, fail = DifyRunWorkflowOperator.execute, RunningTask._stop_if_nobody_waits

    def timed_execute(self: Any, context: Any) -> Any:
        times.append(time.monotonic())
        return execute(self, context)

    async def timed_fail(self: Any, error: Any) -> None:
        times.append(time.monotonic())
        await fail(self, error)

    monkeypatch.setattr(DifyRunWorkflowOperator, "execute", timed_execute)
    monkeypatch.setattr(RunningTask, "_stop_if_nobody_waits", timed_fail)
    phase(dify)
    result = run_operator(timeout=2, retries=2, retry_delay=0, **way)
    assert isinstance(error_of(result), (DifyWorkflowRunTimeout, DifyWorkflowRunUncertain))
    assert times[-1] - times[0] > 1.8
    assert times[-1] - times[0] - standstill.seconds < 3
    assert posts(dify) == 1


def test_a_start_that_too_many_runs_turn_away_waits(dify: DifyStandIn, way: dict[str, Any]) -> None:
    dify.misbehave(too_many_requests(), times=8, only="POST .*/run")
    assert run_operator(timeout=30, **way).state == "success"
    assert len(dify.started) == 1


def test_a_plans_quota_fails_at_once(dify: DifyStandIn, way: dict[str, Any]) -> None:
    dify.misbehave_always(quota_reached(), only="POST .*/run")
    error = error_of(run_operator(retries=2, retry_delay=0, **way))
    assert isinstance(error, DifyRequestError)
    assert "quota" in str(error)
    assert posts(dify) == 1


def test_inputs_from_mapped_tasks_become_lists(dify: DifyStandIn) -> None:
    from tests.airflow.airflow_runs import run_dag

    result = run_dag(
        """
        @task
        def square(n):
            return n * n

        DifyRunWorkflowOperator(task_id="run", inputs={"items": square.expand(n=[1, 2, 3])}, poll_interval=0.05)
        """
    )
    assert result.state == "success"
    assert dify.started[0].inputs == {"items": [1, 4, 9]}


@pytest.mark.parametrize(
    ("version", "error_text"),
    [
        ("1.14.2", None),
        ("1.15.0", None),
        ("1.16.1", "Client response stream closed before app execution completed"),
        ("1.16.1", "App task was stopped"),
        ("1.17", None),
    ],
)
def test_a_run_that_waited_for_a_person_goes_on_and_1_16_1_s_fault_is_named(
    version: str,
    error_text: str | None,
    way: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    caplog.set_level("INFO")
    with DifyStandIn(version) as dify:
        dify.starts.append(Start("run_streaming_paused"))
        dify.resumed_error = f"Aborted: {error_text}"
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))

            def answer() -> None:
                while not dify.started:
                    time.sleep(0.05)
                # Time for the run to get to its form, and for the task to see it there.
                time.sleep(2)
                dify.submit_form(dify.started[0].workflow_run_id, comment="fine")

            person = threading.Thread(target=answer)
            person.start()
            result = run_operator(**way)
            person.join()
    printed = capfd.readouterr()
    assert "waits for a person" in printed.out + printed.err + caplog.text
    if error_text is not None:
        error = error_of(result)
        assert str(error).startswith(f"Aborted: {error_text}")
        assert "1.16.0 and 1.16.1 end runs like this" in str(error)
    else:
        assert result.states["run"] == "success"
        assert result.received["outputs"]["comment"] == "fine"
