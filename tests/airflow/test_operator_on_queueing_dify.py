"""What the operator does on servers where runs queue, starts get lost and inputs are rejected."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from tests.airflow.airflow_runs import OPERATOR_WAYS, error_of, posts, run_dag, run_operator
from tests.combinations import each_or_long, pairs
from tests.dify_stand_in import (
    DIALECTS,
    DifyStandIn,
    Start,
    close,
    form_field,
    lose_response,
    pings_only,
    quota_reached,
    replay,
    reset,
    respond,
    stall,
    too_many_requests,
)

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries", "short_waits")

WAYS = list(OPERATOR_WAYS)
on_todays_dify_or_all = pytest.mark.parametrize("dialect", each_or_long(DIALECTS, short=DIALECTS[-1:]), indirect=True)


@pytest.fixture
def default_dialect() -> str:
    """Today's Dify."""
    return "current"


@on_todays_dify_or_all
@pytest.mark.parametrize(
    ("silence_limit", "operator_way"),
    pairs([pytest.param(300.0, id="the stream stays open"), pytest.param(0.3, id="the server closes it")], WAYS),
    indirect=["operator_way"],
)
def test_a_start_that_is_queued_succeeds_once_a_worker_is_free(
    dify: DifyStandIn, dialect: str, operator_way: dict[str, Any], silence_limit: float
) -> None:
    if not dify.dialect_rules.queues_starts:
        pytest.skip("runs do not queue on this version")
    dify.slots = 0
    dify.silence_limit = silence_limit

    async def free_a_worker_later(request: Any) -> Any:
        dify._loop.call_later(0.5, setattr, dify, "slots", 4)
        return await dify.respond_to(request)

    dify.misbehave(free_a_worker_later, only="POST .*/run")
    # What Dify has accepted is waited for longer than the grace.
    result = run_operator(retries=2, retry_delay=0, timeout=60, not_found_grace=0.2, **operator_way)
    assert result.state == "success"
    assert result.tries["run"] == 1
    assert len(dify.started) == posts(dify) == 1
    assert result.xcoms["run"]["workflow_run_id"] == dify.log[0].id
    assert dify.stopped == []


LOST_RESPONSES: dict[str, Callable[[DifyStandIn], None]] = {
    "reset": lambda dify: dify.misbehave(lose_response(reset()), only="POST .*/run"),
    "close": lambda dify: dify.misbehave(lose_response(close()), only="POST .*/run"),
    "502": lambda dify: dify.misbehave(lose_response(respond(502)), only="POST .*/run"),
    "cut and closed": lambda dify: dify.starts.append(Start(cut=10, then="close")),
    "cut and reset": lambda dify: dify.starts.append(Start(cut=10, then="reset")),
}


@on_todays_dify_or_all
@pytest.mark.parametrize(("lost", "operator_way"), pairs(list(LOST_RESPONSES), WAYS), indirect=["operator_way"])
def test_a_start_whose_response_is_lost_is_found_in_the_log_and_not_sent_twice(
    dify: DifyStandIn, dialect: str, operator_way: dict[str, Any], lost: str
) -> None:
    LOST_RESPONSES[lost](dify)
    result = run_operator(retries=2, retry_delay=0, timeout=60, **operator_way)
    assert result.state == "success"
    assert result.tries["run"] == 1
    assert len(dify.started) == posts(dify) == 1
    assert result.xcoms["run"]["workflow_run_id"] == dify.started[0].workflow_run_id


REJECTED = [
    pytest.param({}, "query", id="missing"),
    pytest.param({"query": 5}, "query", id="of a wrong type"),
    pytest.param({"query": "a", "choice": "c"}, "choice", id="no option"),
]


@on_todays_dify_or_all
@pytest.mark.parametrize(("inputs", "named", "operator_way"), pairs(REJECTED, WAYS), indirect=["operator_way"])
def test_rejected_inputs_fail_at_once_name_the_input_and_start_nothing(
    dify: DifyStandIn, dialect: str, operator_way: dict[str, Any], inputs: dict[str, Any], named: str
) -> None:
    dify.user_input_form = [form_field("query", required=True), form_field("choice", "select", options=("a", "b"))]
    error = error_of(run_operator(inputs=inputs, retries=2, retry_delay=0, **operator_way))
    assert type(error) is DifyInputsRejected
    assert named in str(error)
    assert dify.started == []
    # Nothing is asked but the form; before Airflow 3.3 also, whether an earlier try has started a run.
    asked = [request.path.partition("?")[0].rpartition("/")[2] for request in dify.requests]
    assert sorted(asked) in (["parameters"], ["logs", "parameters"])


def in_the_queue(dify: DifyStandIn) -> None:
    dify.slots = 0


def on_pings(dify: DifyStandIn) -> None:
    dify.misbehave(pings_only(0.1), only="POST .*/run")


def on_a_silent_stream(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running",), cut=2000, then="stall"))


def on_a_silent_response(dify: DifyStandIn) -> None:
    dify.misbehave(stall(300), only="POST .*/run")


def on_polls(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running",), cut=2000, then="close"))


PHASES = [in_the_queue, on_pings, on_a_silent_stream, on_a_silent_response, on_polls]


@pytest.mark.parametrize(("phase", "operator_way"), pairs(PHASES, WAYS), indirect=["operator_way"])
def test_the_timeout_is_kept_in_each_phase(
    dify: DifyStandIn, operator_way: dict[str, Any], phase: Any, monkeypatch: pytest.MonkeyPatch
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
    error = error_of(run_operator(timeout=1, retries=2, retry_delay=0, **operator_way))
    assert isinstance(error, (DifyWorkflowRunTimeout, DifyWorkflowRunUncertain))
    # The connection's own timeout would end some of these waits after 30 seconds, and nothing the others.
    assert 0.9 < times[-1] - times[0] < 25
    # None, where the second was over before the start.
    assert posts(dify) <= 1


def test_a_start_that_too_many_runs_turn_away_waits(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    dify.misbehave(too_many_requests(), replay("run_rate_limited_streaming"), times=3, only="POST .*/run")
    assert run_operator(timeout=60, **operator_way).state == "success"
    assert len(dify.started) == 1


def test_a_plans_quota_fails_at_once(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    dify.misbehave_always(quota_reached(), only="POST .*/run")
    error = error_of(run_operator(retries=2, retry_delay=0, **operator_way))
    assert isinstance(error, DifyRequestError)
    assert "quota" in str(error)
    assert posts(dify) == 1


def test_inputs_from_mapped_tasks_become_lists(dify: DifyStandIn) -> None:
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


AFTER_A_FORM = [
    pytest.param("1.14.2", None, id="1.14.2"),
    pytest.param("1.15.0", None, id="1.15.0"),
    pytest.param("1.16.1", "Client response stream closed before app execution completed", id="1.16.1, stream closed"),
    pytest.param("1.16.1", "App task was stopped", id="1.16.1, stopped"),
    pytest.param("1.17", None, id="1.17"),
]


@pytest.mark.parametrize(
    ("dialect", "error_text", "operator_way"), pairs(AFTER_A_FORM, WAYS), indirect=["dialect", "operator_way"]
)
def test_a_run_that_waited_for_a_person_goes_on_and_1_16_1_s_fault_is_named(
    dify: DifyStandIn,
    dialect: str,
    error_text: str | None,
    operator_way: dict[str, Any],
    everything_said: Callable[[], str],
) -> None:
    dify.starts.append(Start("run_streaming_paused"))
    dify.resumed_error = f"Aborted: {error_text}"

    def answer() -> None:
        until = time.monotonic() + 60
        while "waits for a person" not in everything_said() and time.monotonic() < until:
            time.sleep(0.1)
        dify.submit_form(dify.started[0].workflow_run_id, comment="fine")

    person = threading.Thread(target=answer)
    person.start()
    result = run_operator(**operator_way)
    person.join()
    assert "waits for a person" in everything_said()
    if error_text is not None:
        error = error_of(result)
        assert str(error).startswith(f"Aborted: {error_text}")
        assert "1.16.0 and 1.16.1 end runs like this" in str(error)
    else:
        assert result.states["run"] == "success"
        assert result.received["outputs"]["comment"] == "fine"
