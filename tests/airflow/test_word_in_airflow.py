"""What a user of operator and sensor sees where gateways respond, and where events and record say different things."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER as HAS_TASK_STATE
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyInputsRejected,
    DifyWorkflowRunCannotSucceed,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from tests.airflow.airflow_processes import AIRFLOW_3_0
from tests.airflow.airflow_runs import (
    SENSOR_WAYS,
    START_WAYS,
    error_of,
    posts,
    run_operator,
    run_sensor,
)
from tests.combinations import pairs
from tests.dify_stand_in import (
    GATEWAYS,
    PING,
    DifyStandIn,
    Fault,
    Start,
    gateway,
    kong_404,
    lose_response,
    node_finished,
    rejects,
    replay,
    reset,
    respond,
    said,
    said_error,
    said_finished,
)

pytestmark = pytest.mark.usefixtures(
    "airflow_db", "dify_connection", "quick_retries", "short_reading_on", "short_waits"
)

OUTPUTS = {"answer": "héllo 你好 🎉"}
POLLS = "GET .*/workflows/run/"
STARTED = said("workflow_started", {"inputs": {"sys.user_id": "me"}})


@pytest.fixture
def default_dialect() -> str:
    """Today's Dify."""
    return "current"


def between(dify: DifyStandIn, *faults: Fault) -> None:
    """Let each of these faults come between two polls of runs that Dify responds to."""

    async def as_ever(request: Any) -> Any:
        return await dify.respond_to(request)

    for fault in faults:
        dify.misbehave(as_ever, fault, only=POLLS)


RUNNING = ["running"] * (len(GATEWAYS) + 1)


def is_skipped_on_airflow_3_0(way: dict[str, Any]) -> None:
    if AIRFLOW_3_0 and way.keys() & {"deferrable", "end_from_trigger"}:
        pytest.skip("Airflow 3.0's dag.test() takes the retry of a deferred task for its resumption")


# --- waits behind a gateway


def test_no_gateway_ends_the_wait_of_an_operator_or_stops_its_run(
    dify: DifyStandIn, operator_way: dict[str, Any]
) -> None:
    between(dify, *GATEWAYS.values())
    dify.starts.append(Start(statuses=(*RUNNING, "succeeded"), fields={"outputs": OUTPUTS}, cut="workflow_started"))
    result = run_operator(retries=0, max_consecutive_failures=1, **operator_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    assert (posts(dify), dify.stopped) == (1, [])


@pytest.mark.parametrize(
    ("name", "sensor_way"), pairs(["kong-404", "iap-401"], list(SENSOR_WAYS)), indirect=["sensor_way"]
)
def test_a_gateway_that_stays_leaves_a_sensor_its_retries(
    dify: DifyStandIn, sensor_way: dict[str, Any], name: str
) -> None:
    is_skipped_on_airflow_3_0(sensor_way)
    run_id = dify.add_run("running", "succeeded", outputs=OUTPUTS)
    # The hook of a worker's poll asks four times.
    dify.misbehave(*[GATEWAYS[name]] * (4 if sensor_way.get("mode") else 3), only=POLLS)
    result = run_sensor(workflow_run_id=run_id, retries=1, retry_delay=0, max_consecutive_failures=0, **sensor_way)
    assert result.state == "success"
    if sensor_way.get("mode"):
        (error,) = result.raised["wait"]
        assert type(error) is DifyConnectionError
        assert "in front of Dify" in str(error)


def test_a_gateway_that_stays_leaves_an_operator_its_run_for_the_retry(
    dify: DifyStandIn, operator_way: dict[str, Any]
) -> None:
    is_skipped_on_airflow_3_0(operator_way)
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": OUTPUTS}, cut="workflow_started"))
    # Two polls of the first try, and a look of the second one.
    dify.misbehave(kong_404(), GATEWAYS["cloudflare-403-page"], GATEWAYS["envoy-404"], only=POLLS)
    result = run_operator(retries=1, retry_delay=0, max_consecutive_failures=1, **operator_way)
    assert result.state == "success"
    assert [type(error) for error in result.raised["run"]] == [DifyConnectionError]
    assert "in front of Dify" in str(result.raised["run"][0])
    assert result.received["outputs"] == OUTPUTS
    assert (posts(dify), dify.stopped) == (1, [])


def test_difys_own_refusal_ends_the_wait_as_before(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    dify.starts.append(Start(statuses=("running",), cut="workflow_started"))
    dify.misbehave(rejects(401, "unauthorized", "Access token is invalid"), times=2, only=POLLS)
    error = error_of(run_operator(retries=2, retry_delay=0, **operator_way))
    assert type(error) is DifyAuthenticationError
    assert len(dify.stopped) == 1


# --- runs that Dify says once that it does not know

ONCE = ("running", None, "running", None, "running", "succeeded")


def test_one_not_found_does_not_end_the_wait_of_a_sensor(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    result = run_sensor(workflow_run_id=dify.add_run(*ONCE, outputs=OUTPUTS), retries=0, **sensor_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS


def test_two_in_a_row_end_it(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    result = run_sensor(
        workflow_run_id=dify.add_run("running", "running", None), retries=2, retry_delay=0, **sensor_way
    )
    assert type(error_of(result, "wait")) is DifyWorkflowRunNotFound


# --- records that contradict the events


def stays_running(dify: DifyStandIn) -> tuple[str | None, ...]:
    return ("running",)


def is_lost(dify: DifyStandIn) -> tuple[str | None, ...]:
    return (None,)


def fails(dify: DifyStandIn) -> tuple[str | None, ...]:
    dify.misbehave_always(rejects(500, "unknown", "Internal Server Error"), only=POLLS)
    return ("running",)


RECORDS = [stays_running, is_lost, fails]
on_each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.__name__)


@pytest.mark.parametrize(("record", "then"), pairs(RECORDS, ["close", "pings"]))
def test_a_run_that_its_events_say_succeeded_is_a_success_with_a_warning(
    dify: DifyStandIn, record: Any, then: str, everything_said: Callable[[], str]
) -> None:
    raw = (PING, STARTED, said_finished("succeeded", OUTPUTS))
    dify.starts.append(Start(raw=raw, statuses=record(dify), then=then))
    result = run_operator(not_found_grace=0.4, retries=1, retry_delay=0, timeout=15)
    assert (result.state, result.tries["run"]) == ("success", 1)
    assert result.received["outputs"] == OUTPUTS
    assert result.xcoms["run"]["workflow_run"]["status"] == "succeeded"
    assert result.xcoms["run"]["answer"] == OUTPUTS["answer"]
    assert (posts(dify), dify.stopped) == (1, [])
    assert "warning" in everything_said().lower()


@pytest.mark.parametrize(
    ("arguments", "fields"),
    [
        pytest.param({"timeout": 3}, {}, id="timeout"),
        pytest.param(
            {"run_timeout": 1, "timeout": 3}, {"created_at": 1_700_000_000}, id="run_timeout", marks=pytest.mark.long
        ),
    ],
)
def test_also_where_a_limit_of_time_comes_first(
    dify: DifyStandIn, arguments: dict[str, Any], fields: dict[str, Any]
) -> None:
    raw = (PING, STARTED, said_finished("succeeded", OUTPUTS))
    dify.starts.append(Start(raw=raw, statuses=("running",), fields=fields))
    result = run_operator(not_found_grace=60, **arguments)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    assert dify.stopped == []


@on_each_record
def test_a_run_that_its_events_say_failed_is_a_failure_that_retries_repeat(dify: DifyStandIn, record: Any) -> None:
    finished = said_finished("failed", error="no such model")
    dify.starts.append(Start(raw=(PING, STARTED, finished), statuses=record(dify)))
    if record is stays_running and not HAS_TASK_STATE:
        # Nothing would keep a retry from taking up the run whose record stays.
        error = error_of(run_operator(not_found_grace=0.4, retries=1, retry_delay=0, timeout=15))
        assert type(error) is DifyWorkflowRunCannotSucceed
        assert (posts(dify), dify.stopped) == (1, [])
        return
    if record is fails:
        result = run_operator(not_found_grace=0.4, timeout=15)
        error = error_of(result)
    else:
        dify.starts.append(Start(statuses=("succeeded",), fields={"outputs": OUTPUTS}))
        result = run_operator(not_found_grace=0.4, retries=1, retry_delay=0, timeout=15)
        assert (result.state, result.tries["run"]) == ("success", 2)
        (error,) = result.raised["run"]
    assert type(error) is DifyWorkflowRunFailed
    assert "no such model" in str(error)
    assert dify.started[0].workflow_run_id in str(error)
    assert dify.stopped == []


def test_a_partial_success_by_the_events_is_judged_as_any(dify: DifyStandIn) -> None:
    raw = (PING, STARTED, said_finished("partial-succeeded", OUTPUTS))
    dify.starts.extend([Start(raw=raw, statuses=("running",))] * 2)
    assert run_operator(not_found_grace=0.4, timeout=15).received["outputs"] == OUTPUTS
    error = error_of(run_operator(not_found_grace=0.4, timeout=15, fail_on_partial_success=True))
    assert type(error) is (DifyWorkflowRunFailed if HAS_TASK_STATE else DifyWorkflowRunCannotSucceed)
    assert "fail_on_partial_success" in str(error)


def test_a_task_that_is_killed_when_the_events_have_ended_stops_nothing(dify: DifyStandIn) -> None:
    raw = (PING, STARTED, said_finished("succeeded", OUTPUTS))
    dify.starts.append(Start(raw=raw, statuses=("running",)))
    try:
        run_operator(not_found_grace=60, execution_timeout=timedelta(seconds=1), timeout=20)
    except BaseException as error:
        # Airflow 2 lets it out of dag.test().
        assert type(error).__name__ == "AirflowTaskTimeout"  # noqa: PT017
    assert dify.stopped == []


STOPPED_AS_FAILED = {"error": "Aborted: User requested stop"}


def test_an_operator_does_not_repeat_a_run_that_failed_because_of_a_stop(
    dify: DifyStandIn, operator_way: dict[str, Any]
) -> None:
    dify.starts.append(Start(statuses=("running", "failed"), fields=STOPPED_AS_FAILED, cut="workflow_started"))
    error = error_of(run_operator(retries=2, retry_delay=0, **operator_way))
    assert type(error) is DifyWorkflowRunCannotSucceed
    assert posts(dify) == 1


# --- starts without workflow_started

NODE = said("node_started", {"title": "Ask", "node_type": "llm"})
NODE_ENDED = said("node_finished", node_finished("Ask", total_price="0.25")["data"])


def test_a_run_without_its_first_event_has_its_node_lines_its_price_and_its_ids(
    dify: DifyStandIn, everything_said: Callable[[], str]
) -> None:
    raw = (PING, NODE_ENDED, 0.3, NODE, NODE_ENDED, said_finished("succeeded", OUTPUTS))
    dify.starts.append(Start(raw=raw, statuses=("succeeded",), fields={"outputs": OUTPUTS}))
    # No look at the record before the end of the events.
    result = run_operator(timeout=10, poll_interval=1)
    assert result.state == "success"
    (started,) = dify.started
    assert result.xcoms["run"]["workflow_run_id"] == started.workflow_run_id
    assert result.xcoms["run"]["task_id"] == started.task_id
    # The event that named the run counts, too.
    assert result.xcoms["run"]["workflow_run"]["total_price"] == "0.50"
    said_of_it = everything_said()
    assert "Node 'Ask' (llm) started." in said_of_it
    assert f"Dify started workflow run {started.workflow_run_id}" in said_of_it


def test_a_run_without_its_first_event_is_named_at_once(dify: DifyStandIn, start_way: dict[str, Any]) -> None:
    # A stream that stays open: without a name the task would wait on it up to its timeout.
    polls = ("running", "running", "succeeded")
    dify.starts.append(Start(raw=(PING, NODE), statuses=polls, fields={"outputs": OUTPUTS}, then="pings"))
    result = run_operator(timeout=20, **start_way)
    assert result.states["run"] == "success"
    value = dify.started[0].workflow_run_id if start_way == START_WAYS["no wait"] else OUTPUTS
    assert result.xcoms["run"]["return_value"] == value


def test_a_run_without_its_first_event_is_stopped_at_the_timeout(dify: DifyStandIn) -> None:
    dify.starts.append(Start(raw=(PING, NODE, 0.2, NODE_ENDED), statuses=("running",), then="pings"))
    assert type(error_of(run_operator(timeout=1))) is DifyWorkflowRunTimeout
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


@pytest.mark.parametrize(("has_record", "start_way"), pairs([True, False], list(START_WAYS)), indirect=["start_way"])
def test_a_run_whose_last_event_is_its_first_has_ended(
    dify: DifyStandIn, start_way: dict[str, Any], has_record: bool
) -> None:
    raw = (PING, said_finished("succeeded", OUTPUTS))
    statuses = ("running", "succeeded") if has_record else ("running",)
    dify.starts.append(Start(raw=raw, statuses=statuses, fields={"outputs": OUTPUTS} if has_record else {}))
    result = run_operator(timeout=8, not_found_grace=0.4, **start_way)
    assert result.states["run"] == "success"
    assert dify.stopped == []


REJECTED = [
    pytest.param(
        said_finished("failed", error="query is required in input form", task_id="$RUN"), "close", id="by its ids"
    ),
    pytest.param(
        said_error("query is required in input form", 400, "invalid_param", task_id="$TASK"), "pings", id="by an error"
    ),
]


@pytest.mark.parametrize(("event", "then", "start_way"), pairs(REJECTED, list(START_WAYS)), indirect=["start_way"])
def test_inputs_that_dify_rejects_among_the_events_fail_without_retry(
    dify: DifyStandIn, start_way: dict[str, Any], event: bytes, then: str
) -> None:
    dify.starts.append(Start(raw=(PING, event), statuses=(None,), then=then))
    error = error_of(run_operator(retries=2, retry_delay=0, timeout=15, not_found_grace=0.4, **start_way))
    assert type(error) is DifyInputsRejected
    assert "query is required" in str(error)
    assert posts(dify) == 1


# --- an error before the run has a name

WORDS = "1 validation error for VariableEntity"


@pytest.mark.parametrize(("then", "start_way"), pairs(["close", "pings"], list(START_WAYS)), indirect=["start_way"])
def test_a_start_that_dify_says_failed_is_repeated_by_retries(
    dify: DifyStandIn, start_way: dict[str, Any], then: str
) -> None:
    is_skipped_on_airflow_3_0(start_way)
    dify.starts.append(Start(raw=(PING, said_error(WORDS, 500)), statuses=(None,), then=then))
    dify.starts.append(Start(statuses=("succeeded",), fields={"outputs": OUTPUTS}))
    result = run_operator(retries=1, retry_delay=0, not_found_grace=0.4, timeout=15, **start_way)
    assert (result.states["run"], result.tries["run"]) == ("success", 2)
    (error,) = result.raised["run"]
    assert type(error) is DifyWorkflowRunFailed
    assert WORDS in str(error)
    assert (posts(dify), dify.stopped) == (2, [])


# --- starts that were not accepted

NOT_ACCEPTED: dict[str, tuple[Fault, str]] = {
    "502": (gateway(502, "<html><title>502 Bad Gateway</title>nginx</html>"), "502"),
    "504": (gateway(504, "upstream request timeout", "text/plain"), "504"),
    "500": (rejects(500, "unknown", "Internal Server Error"), "Internal Server Error"),
    "reset": (reset(), "may or may not have started"),
}


@pytest.mark.parametrize(("failure", "start_way"), pairs(list(NOT_ACCEPTED), list(START_WAYS)), indirect=["start_way"])
def test_a_start_that_was_not_accepted_ends_after_the_grace_as_uncertain(
    dify: DifyStandIn, start_way: dict[str, Any], failure: str
) -> None:
    fault, words = NOT_ACCEPTED[failure]
    dify.misbehave(fault, only="POST")
    error = error_of(run_operator(retries=2, retry_delay=0, not_found_grace=0.6, timeout=300, **start_way))
    assert type(error) is DifyWorkflowRunUncertain
    assert words in str(error)
    assert (posts(dify), dify.stopped) == (1, [])
    assert dify.requests[-1].at - dify.requests[0].at < 120


def test_who_wants_it_starts_again_after_the_grace(dify: DifyStandIn, start_way: dict[str, Any]) -> None:
    is_skipped_on_airflow_3_0(start_way)
    dify.misbehave(gateway(502, "<html><title>502 Bad Gateway</title></html>"), only="POST")
    dify.starts.append(Start(statuses=("succeeded",), fields={"outputs": OUTPUTS}))
    result = run_operator(
        retries=1, retry_delay=0, not_found_grace=0.5, timeout=60, restart_lost_runs=True, **start_way
    )
    assert (result.states["run"], result.tries["run"]) == ("success", 2)
    (error,) = result.raised["run"]
    assert type(error) is DifyConnectionError
    assert "502" in str(error)
    assert (posts(dify), len(dify.started)) == (2, 1)


def test_but_not_where_a_look_into_the_log_has_failed(dify: DifyStandIn, start_way: dict[str, Any]) -> None:
    dify.misbehave(reset(), only="POST")
    served = iter(range(1000))

    async def fail_once(request: Any) -> Any:
        # The first looks are those before the start.
        is_first_after_it = posts(dify) and next(served) == 1
        return await (respond(503)(request) if is_first_after_it else dify.respond_to(request))

    dify.misbehave_always(fail_once, only="GET .*/logs")
    result = run_operator(
        retries=2, retry_delay=0, not_found_grace=0.8, timeout=60, restart_lost_runs=True, **start_way
    )
    assert type(error_of(result)) is DifyWorkflowRunUncertain
    assert posts(dify) == 1


def test_the_retry_takes_the_run_that_came_up_meanwhile(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    dify.slots = 0
    dify.misbehave(lose_response(gateway(504)), only="POST")
    dify.starts.append(Start(statuses=("succeeded",), fields={"outputs": OUTPUTS}))
    execute = DifyRunWorkflowOperator.execute

    def free_a_slot_and_execute(self: Any, context: Any) -> Any:
        if context["ti"].try_number == 2:
            dify.slots = 4
            while not dify.log:
                time.sleep(0.01)
        return execute(self, context)

    monkeypatch.setattr(DifyRunWorkflowOperator, "execute", free_a_slot_and_execute)
    result = run_operator(retries=1, retry_delay=0, not_found_grace=0.5, timeout=60, restart_lost_runs=True)
    assert (result.state, result.tries["run"]) == ("success", 2)
    assert (posts(dify), len(dify.started)) == (1, 1)


# --- retries


def test_a_retry_gives_an_earlier_run_up_only_when_dify_has_said_twice_that_it_is_gone(
    dify: DifyStandIn, operator_way: dict[str, Any]
) -> None:
    is_skipped_on_airflow_3_0(operator_way)
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": OUTPUTS}, cut="workflow_started"))
    # Two polls of the first try fail; then Dify does not know the run once.
    dify.misbehave(respond(503), respond(503), replay("detail_unknown_uuid", "1.16.1"), only=POLLS)
    result = run_operator(retries=1, retry_delay=0, max_consecutive_failures=1, **operator_way)
    assert result.state == "success"
    assert (posts(dify), dify.stopped) == (1, [])
