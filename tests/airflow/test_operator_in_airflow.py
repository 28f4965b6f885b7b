"""What a user of the operator sees in Airflow: states, XComs, messages, and what Dify was asked to do."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyInputsRejected,
    DifyRequestError,
    DifyTaskKilled,
    DifyWorkflowRunCannotSucceed,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.tasks.loop import TaskLoop
from tests.airflow.airflow_processes import AIRFLOW_3_0, AIRFLOW_3_4
from tests.airflow.airflow_runs import OPERATOR_WAYS, error_of, run_dag, run_operator
from tests.combinations import pairs
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Start,
    form_field,
    rejects,
    replay,
    respond,
)

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

OUTPUTS = {"answer": "héllo 你好 🎉", "nested": {"items": [1, "二", None]}}


def start(*statuses: str | None, **arguments: Any) -> Start:
    fields = arguments.pop("fields", {"outputs": OUTPUTS} if "succeeded" in statuses else {})
    return Start(statuses=statuses, fields=fields, **arguments)


def test_a_run_is_started_and_its_outputs_reach_the_next_task(
    dify: DifyStandIn, dialect: str, operator_way: dict[str, Any]
) -> None:
    dify.starts.append(start("running", "succeeded"))
    inputs = {"query": "二", "n": 3, "list": [1, None], "who": "{{ ds }}"}
    result = run_operator(inputs=inputs, **operator_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    (started,) = dify.started
    assert started.inputs == {**inputs, "who": started.inputs["who"]}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", started.inputs["who"])
    xcoms = result.xcoms["run"]
    assert xcoms.pop("workflow_run")["status"] == "succeeded"
    assert xcoms == {
        "return_value": OUTPUTS,
        **OUTPUTS,
        "workflow_run_id": started.workflow_run_id,
        "task_id": started.task_id,
    }
    assert dify.stopped == []


@pytest.mark.parametrize(
    ("arguments", "user"),
    [({}, r"airflow/[0-9a-f]{8}/dag_\d+/run/manual__\S+/1"), ({"user": "{{ 'data' }}-team"}, "data-team")],
    ids=["by default", "of one's own"],
)
def test_the_user_names_dag_task_run_and_try_or_is_ones_own(
    dify: DifyStandIn, arguments: dict[str, Any], user: str
) -> None:
    dify.starts.append(start("succeeded"))
    run_operator(workflow_id="2d7a7544-770c-496f-8ef9-4e622682b330", **arguments)
    assert re.fullmatch(user, dify.started[0].user)
    assert dify.started[0].workflow_id == "2d7a7544-770c-496f-8ef9-4e622682b330"


def test_without_the_wait_the_run_id_is_returned_for_a_sensor(dify: DifyStandIn) -> None:
    dify.starts.append(start("running", "succeeded"))
    result = run_dag(
        """
        run = DifyRunWorkflowOperator(task_id="run", inputs={}, wait_for_completion=False)
        wait = DifyWorkflowRunSensor(task_id="wait", workflow_run_id=run.output, poke_interval=0.05)
        """
    )
    assert result.state == "success"
    assert result.xcoms["run"]["return_value"] == dify.started[0].workflow_run_id
    assert result.xcoms["wait"]["return_value"] == OUTPUTS
    assert dify.stopped == []


def test_runs_fan_out_over_a_list_of_inputs(dify: DifyStandIn) -> None:
    for number in range(3):
        dify.starts.append(start("succeeded", fields={"outputs": {"n": number}}))
    result = run_dag(
        """
        run = DifyRunWorkflowOperator.partial(task_id="run", poll_interval=0.05).expand(
            inputs=[{"q": "a"}, {"q": "b"}, {"q": "c"}]
        )

        @task
        def use(outputs):
            received("outputs", list(outputs))

        use(run.output)
        """
    )
    assert result.state == "success"
    assert sorted(started.inputs["q"] for started in dify.started) == ["a", "b", "c"]
    names = {started.user.split("/")[3] for started in dify.started}
    # From Airflow 3.4 on, the execution of the map stands there, too, the same in all of them.
    (region,) = {name[5:-1] for name in names}
    assert names == {f"run[0{region}]", f"run[1{region}]", f"run[2{region}]"}
    assert bool(region) == AIRFLOW_3_4
    assert sorted(output["n"] for output in result.received["outputs"]) == [0, 1, 2]


# Without the end of its events, which would say that the run succeeded.
CUT = {"cut": "workflow_started"}

ENDINGS = [
    pytest.param(start("stopped"), {}, DifyWorkflowRunCannotSucceed, "was stopped", id="stopped"),
    pytest.param(start(None, **CUT), {"not_found_grace": 0.2}, DifyWorkflowRunNotFound, "still unknown", id="unknown"),
    pytest.param(
        start("running", fields={"created_at": 1_700_000_000}, **CUT),
        {"run_timeout": 60},
        DifyWorkflowRunTimeout,
        "orphaned",
        id="overdue",
    ),
    pytest.param(
        start("running", **CUT),
        {"timeout": 1},
        DifyWorkflowRunTimeout,
        "timeout of 1 seconds is over",
        id="timeout",
    ),
]


@pytest.mark.parametrize(
    ("script", "arguments", "exception", "message", "operator_way"),
    pairs(ENDINGS, list(OPERATOR_WAYS)),
    indirect=["operator_way"],
)
def test_a_run_that_does_not_succeed_fails_the_task_without_retry_and_is_not_left_running(
    dify: DifyStandIn,
    operator_way: dict[str, Any],
    script: Start,
    arguments: dict[str, Any],
    exception: type[Exception],
    message: str,
) -> None:
    dify.starts.append(script)
    result = run_operator(retries=2, retry_delay=0, **operator_way, **arguments)
    error = error_of(result)
    assert type(error) is exception
    assert re.search(message, str(error))
    (started,) = dify.started
    assert started.workflow_run_id in str(error)
    over = exception is DifyWorkflowRunCannotSucceed
    assert dify.stopped == ([] if over else [(started.task_id, started.user)])


SHUT_DOWN = {"error": "Aborted: Workflow stopped because the worker is shutting down."}
FAILED_RUNS = [
    pytest.param(start("running", "failed"), {}, "Connection refused", id="failed"),
    pytest.param(start("partial-succeeded"), {"fail_on_partial_success": True}, "partial", id="partial"),
    pytest.param(start("stopped", fields=SHUT_DOWN), {}, "shutting down", id="worker shut down"),
]


@pytest.mark.parametrize(
    ("first", "arguments", "message", "operator_way"),
    pairs(FAILED_RUNS, list(OPERATOR_WAYS)),
    indirect=["operator_way"],
)
def test_a_failed_run_leaves_the_task_its_retries_and_each_starts_a_new_run(
    dify: DifyStandIn, operator_way: dict[str, Any], first: Start, arguments: dict[str, Any], message: str
) -> None:
    if AIRFLOW_3_0 and operator_way:
        pytest.skip("Airflow 3.0's dag.test() takes the retry of a deferred task for its resumption")
    dify.starts.extend([first, start("succeeded")])
    result = run_operator(retries=1, retry_delay=0, **operator_way, **arguments)
    assert result.state == "success"
    assert result.tries["run"] == 2
    assert type(result.raised["run"][0]) is DifyWorkflowRunFailed
    assert message in str(result.raised["run"][0])
    assert len({started.workflow_run_id for started in dify.started}) == 2
    assert dify.stopped == []


def test_stopping_can_be_left_out(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    dify.starts.append(start("running", **CUT))
    assert run_operator(timeout=0.5, stop_on_failure=False, **operator_way).state == "failed"
    assert dify.stopped == []


def test_a_run_that_is_written_late_is_polled_until_it_appears(
    dify: DifyStandIn, dialect: str, operator_way: dict[str, Any]
) -> None:
    dify.starts.append(start(None, None, "running", "succeeded"))
    assert run_operator(**operator_way).state == "success"


# --- the start


@pytest.mark.parametrize(
    ("recording", "operator_way"),
    pairs(["run_streaming_missing_input", "run_unpublished"], list(OPERATOR_WAYS)),
    indirect=["operator_way"],
)
def test_a_rejected_start_fails_without_retry_and_says_what_dify_said(
    dify: DifyStandIn, operator_way: dict[str, Any], recording: str
) -> None:
    dify.misbehave_always(replay(recording), only="POST")
    result = run_operator(retries=2, retry_delay=0, **operator_way)
    error = error_of(result)
    assert isinstance(error, DifyRequestError)
    assert isinstance(error, DifyInputsRejected) == (recording == "run_streaming_missing_input")
    assert re.search("query is required in input form|Workflow not published", str(error))
    assert re.search(r"\S See https://\S+/docs/failures\.md#[a-z-]+$", str(error))
    assert sum(request.method == "POST" for request in dify.requests) == 1


KINDS_OF_TEXT = [("version", "select"), ("yes", "paragraph")]


def run_with_native_rendering(inputs: dict[str, str]) -> Any:
    return run_dag(
        f"""
        dag.render_template_as_native_obj = True
        DifyRunWorkflowOperator(task_id="run", inputs={inputs!r}, poll_interval=0.05, on_failure_callback=raised)
        """,
        params={"order": "4711", "version": "1.10", "yes": "True"},
    )


@pytest.mark.parametrize(
    ("param", "kind"),
    [("order", "text-input"), *(pytest.param(*each, marks=pytest.mark.long) for each in KINDS_OF_TEXT)],
)
def test_a_text_that_native_rendering_has_made_a_number_of_is_rejected_with_the_likely_cause(
    dify: DifyStandIn, param: str, kind: str
) -> None:
    dify.user_input_form = [
        form_field("what", kind, required=True, options=("1.10", "4711") if kind == "select" else ())
    ]
    result = run_with_native_rendering({"what": f"{{{{ params.{param} }}}}"})
    (error,) = result.raised["run"]
    assert isinstance(error, DifyInputsRejected)
    why = r"Input 'what' must be text, not (a number|true)\. With render_template_as_native_obj=True a template"
    assert re.match(why, str(error))
    assert dify.started == []
    # What the documentation says to do.
    assert run_with_native_rendering({"what": f"'{{{{ params.{param} }}}}'"}).state == "success"
    assert dify.started[0].inputs == {"what": {"order": "4711", "version": "1.10", "yes": "True"}[param]}


@pytest.mark.parametrize("failed_requests", [5, 100])
def test_a_start_that_broke_off_is_not_sent_twice_where_the_log_cannot_be_read(
    dify: DifyStandIn, failed_requests: int
) -> None:
    dify.starts.append(start("succeeded", cut=10, then="reset"))
    requests = iter(range(1000))

    async def then_go_away(request: Any) -> Any:
        if request.method == "POST" and "/run" in request.path:
            return await dify.respond_to(request)
        number = next(requests)
        return await (
            respond((503, 429)[number % 2])(request) if number < failed_requests else dify.respond_to(request)
        )

    dify.misbehave_always(then_go_away)
    # It goes on through ten times the grace.
    grace = 3 if failed_requests == 5 else 0.1
    result = run_operator(retries=2, retry_delay=0, not_found_grace=grace)
    assert len(dify.started) == 1
    assert result.tries["run"] == 1
    if failed_requests == 5:
        assert result.received["outputs"] == OUTPUTS
    else:
        assert type(result.raised["run"][0]) is DifyWorkflowRunUncertain


@pytest.mark.parametrize(
    "refusal",
    [
        replay("auth_bad_key"),
        replay("detail_disabled_api"),
        rejects(404, "not_found", "No such route"),
    ],
)
def test_a_log_that_refuses_does_not_hide_that_a_start_broke_off(dify: DifyStandIn, refusal: Any) -> None:
    dify.starts.append(start("running", cut=10, then="reset"))
    dify.misbehave_always(refusal, only="GET .*/logs")
    result = run_operator(retries=2, retry_delay=0)
    assert result.tries["run"] == 1
    (failure,) = result.raised["run"]
    assert type(failure) is DifyWorkflowRunUncertain
    # The cause comes first, and the log's refusal after it.
    assert re.match(r".+: no run id came back from .+ The log could not be read: ", str(failure))
    assert len(dify.started) == 1


def test_a_start_that_broke_off_is_found_behind_pages_of_other_runs_where_the_server_ignores_the_user(
    dify: DifyStandIn,
) -> None:
    dify.logs_ignore_user = True
    dify.starts.append(start("running", "succeeded", cut=10, then="reset"))

    async def start_among_others(request: Any) -> Any:
        try:
            return await dify.respond_to(request)
        finally:
            dify.add_logged_runs(45)

    dify.misbehave(start_among_others, only="POST")
    result = run_operator()
    assert result.received["outputs"] == OUTPUTS
    assert len(dify.started) == 1


def test_a_start_that_several_runs_may_be_fails_and_names_them(dify: DifyStandIn) -> None:
    async def send_twice(request: Any) -> Any:
        await dify.respond_to(request)
        return await dify.respond_to(request)

    dify.starts.extend([start("running", cut=10), start("running", cut=10)])
    dify.misbehave(send_twice, only="POST")
    error = error_of(run_operator(not_found_grace=0.3))
    assert type(error) is DifyWorkflowRunUncertain
    assert len(dify.started) == 2
    assert all(started.workflow_run_id in str(error) for started in dify.started)


# --- the wait on a worker


@pytest.mark.parametrize(("then", "cut"), pairs(["close", "reset", "stall", "pings"], [650, 2000]))
def test_polls_follow_a_stream_that_breaks(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, then: str, cut: int
) -> None:
    connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY, "extra": {"timeout": 0.5}}
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
    dify.starts.append(start("running", "running", "succeeded", cut=cut, then=then))
    result = run_operator()
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    assert len(dify.started) == 1


def test_a_paused_run_that_only_pings_ends_with_the_timeout(dify: DifyStandIn) -> None:
    dify.starts.append(start("paused", recording="run_streaming_paused", then="pings"))
    result = run_operator(timeout=1)
    assert type(result.raised["run"][0]) is DifyWorkflowRunTimeout
    assert len(dify.stopped) == 1


def test_the_detail_decides_where_the_stream_says_something_else(
    dify: DifyStandIn, everything_said: Callable[[], str]
) -> None:
    dify.starts.append(start("stopped", recording="run_streaming_echo"))
    assert run_operator().states["run"] == "failed"
    assert "The event stream said succeeded, the run's detail says stopped" in everything_said()


def test_a_task_that_is_killed_stops_its_run(dify: DifyStandIn) -> None:
    # Airflow kills a task whose execution_timeout is over.
    dify.starts.append(start("running", then="pings", cut=2000))
    try:
        assert run_operator(execution_timeout=timedelta(seconds=1)).states["run"] == "failed"
    except BaseException as error:
        # Airflow 2 lets it out of dag.test().
        assert type(error).__name__ == "AirflowTaskTimeout"  # noqa: PT017
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


def test_a_last_try_that_loses_sight_of_its_run_stops_it(dify: DifyStandIn) -> None:
    dify.starts.append(start("running", cut=2000))
    dify.misbehave_always(respond(503), only="GET .*/workflows/run/")
    result = run_operator(max_consecutive_failures=1, retries=0)
    assert result.states["run"] == "failed"
    assert [type(error) for error in result.raised["run"]] == [DifyConnectionError]
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


@pytest.mark.parametrize(
    ("error", "arguments", "exception", "message"),
    [
        ("Trigger timeout", {}, DifyWorkflowRunTimeout, "timeout of 604800 seconds is over. No triggerer reported"),
        ("Trigger timeout", {"execution_timeout": timedelta(hours=1)}, DifyTaskKilled, "execution_timeout of 1:00:00"),
        ("Trigger timeout", {"execution_timeout": timedelta(days=8)}, DifyWorkflowRunTimeout, "of 604800 seconds"),
    ],
)
def test_a_deferral_whose_time_is_over_says_whose_and_stops_the_run(
    dify: DifyStandIn,
    monkeypatch: pytest.MonkeyPatch,
    error: str,
    arguments: dict[str, Any],
    exception: type[Exception],
    message: str,
) -> None:
    dify.starts.append(start("running", "succeeded", cut=2000))
    resume_execution = DifyRunWorkflowOperator.resume_execution

    def fail(self: Any, next_method: str, next_kwargs: Any, context: Any) -> Any:
        # What Airflow's scheduler resumes a task with that no triggerer brought to its end.
        return resume_execution(self, "__fail__", {"error": error}, context)

    monkeypatch.setattr(DifyRunWorkflowOperator, "resume_execution", fail)
    result = run_operator(deferrable=True, **arguments)
    assert result.states["run"] == "failed"
    (raised,) = result.raised["run"]
    assert type(raised) is exception
    assert message in str(raised)
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


@pytest.mark.parametrize("stops", [True, False])
def test_what_a_deferred_task_leaves_to_the_triggerer(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, stops: bool
) -> None:
    dify.starts.append(start("running", "succeeded", cut=2000))
    left: dict[str, Any] = {}
    defer = DifyRunWorkflowOperator.defer

    def defer_and_keep(self: Any, **arguments: Any) -> Any:
        left.update(arguments)
        return defer(self, **arguments)

    monkeypatch.setattr(DifyRunWorkflowOperator, "defer", defer_and_keep)
    began = time.time()
    assert run_operator(deferrable=True, timeout=300, stop_on_failure=stops).state == "success"
    wait = left["trigger"].wait
    assert wait.deadline == pytest.approx(began + 300, abs=60)
    # Airflow's own limit comes later: it would say less of what happened.
    assert left["timeout"].total_seconds() == pytest.approx(wait.deadline - time.time() + 120, abs=60)
    assert left["timeout"].total_seconds() > wait.deadline - began + 60
    # What a user who ends the task gets.
    asyncio.run(left["trigger"].on_kill())
    started = dify.started[0]
    assert dify.stopped == ([(started.task_id, started.user)] if stops else [])


@pytest.fixture
def deferrals(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds since the test began at which tasks deferred."""
    began, times = time.monotonic(), []
    defer = DifyRunWorkflowOperator.defer

    def defer_and_note(self: Any, **arguments: Any) -> Any:
        times.append(time.monotonic() - began)
        return defer(self, **arguments)

    monkeypatch.setattr(DifyRunWorkflowOperator, "defer", defer_and_note)
    return times


@pytest.mark.parametrize("operator_way", [way for way in OPERATOR_WAYS if way != "worker"], indirect=True)
@pytest.mark.parametrize("status", ["succeeded", "failed"])
def test_a_run_that_is_over_soon_ends_on_the_worker_that_started_it(
    dify: DifyStandIn, operator_way: dict[str, Any], deferrals: list[float], status: str
) -> None:
    dify.starts.append(start(status, duration=0.5))
    result = run_operator(**{**operator_way, "defer_after": 30})
    assert result.states["run"] == {"succeeded": "success"}.get(status, status)
    assert result.received == ({"outputs": OUTPUTS} if status == "succeeded" else {})
    assert deferrals == []


@pytest.mark.parametrize("seconds", [0, 0.5])
def test_a_run_that_takes_longer_is_left_to_the_triggerer_after_defer_after(
    dify: DifyStandIn, deferrals: list[float], seconds: float
) -> None:
    dify.starts.append(start("succeeded", duration=1.5))
    result = run_operator(deferrable=True, defer_after=seconds)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    (deferred,) = deferrals
    assert deferred >= seconds
    assert len(dify.started) == 1
    assert dify.stopped == []


def test_a_timeout_that_comes_before_defer_after_is_kept_on_the_worker(
    dify: DifyStandIn, deferrals: list[float]
) -> None:
    dify.starts.append(start("succeeded", duration=30))
    error = error_of(run_operator(deferrable=True, defer_after=30, timeout=1))
    assert type(error) is DifyWorkflowRunTimeout
    assert deferrals == []
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


# The ways in which another process waits for the run once the task's own has done its part.
HANDED_OVER: dict[str, dict[str, Any]] = {"deferrable": {"deferrable": True}, "no wait": {"wait_for_completion": False}}


@pytest.mark.parametrize("way", HANDED_OVER.values(), ids=HANDED_OVER)
def test_a_task_that_is_killed_after_it_left_the_wait_to_others_does_not_stop_its_run(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    dify.starts.append(start("running", "succeeded", cut=2000))
    execute = DifyRunWorkflowOperator.execute

    def execute_and_be_killed(self: DifyRunWorkflowOperator, context: Any) -> Any:
        # The process is still there for a moment: it tells Airflow what it returned or deferred to.
        try:
            return execute(self, context)
        finally:
            self.on_kill()

    monkeypatch.setattr(DifyRunWorkflowOperator, "execute", execute_and_be_killed)
    result = run_operator(**way)
    assert result.states["run"] == "success"
    assert dify.stopped == []


@pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0's dag.test() takes the retry of a deferred task for a resumption")
@pytest.mark.parametrize("way", HANDED_OVER.values(), ids=HANDED_OVER)
def test_a_task_that_is_killed_before_it_leaves_the_wait_to_others_is_retried(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, way: dict[str, Any]
) -> None:
    dify.starts.extend([start("running", "succeeded", cut=2000)] * 2)
    run = TaskLoop.run
    kills = iter(range(1))

    def run_and_be_killed(self: TaskLoop, work: Any) -> Any:
        # As on Airflow 3, which lets the task go on after its signal: it comes when the work is just over.
        try:
            return run(self, work)
        finally:
            for _ in kills:
                self.kill()

    monkeypatch.setattr(TaskLoop, "run", run_and_be_killed)
    result = run_operator(retries=1, retry_delay=0, **way)
    assert [type(error) for error in result.raised["run"]] == [DifyTaskKilled]
    assert result.states["run"] == "success"
    # The retry starts a new run if the first one was stopped, and continues it if nothing would remember the stop.
    assert len(dify.started) == 1 + len(dify.stopped)


@pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="this Airflow stores rendered fields before a task runs only")
def test_rendered_templates_show_the_default_user(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    from airflow.models.renderedtifields import RenderedTaskInstanceFields
    from airflow.utils.session import create_session

    dify.starts.extend([start("failed"), start("succeeded")])
    assert run_operator(retries=1, retry_delay=0, **operator_way).tries["run"] == 2
    with create_session() as session:
        shown = [row.rendered_fields.get("user") for row in session.query(RenderedTaskInstanceFields).all()]
    assert dify.started[1].user.endswith("/2")
    assert dify.started[1].user in shown


def test_a_worker_that_comes_after_the_timeout_still_reads_a_run_that_the_triggerer_saw_end(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    dify.starts.append(start("running", "succeeded", cut=2000))
    execute_complete = DifyRunWorkflowOperator.execute_complete

    def come_late(self: DifyRunWorkflowOperator, context: Any, event: Any = None, **_: Any) -> Any:
        dify.misbehave(respond(503), only="GET .*/workflows/run/")
        return execute_complete(self, context, event, deadline=time.time() - 1)

    monkeypatch.setattr(DifyRunWorkflowOperator, "execute_complete", come_late)
    result = run_operator(deferrable=True)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS


# --- retries


def the_first_try_loses_sight_of_its_run(dify: DifyStandIn) -> None:
    """Let all polls of a first try fail that survives three; a retry's start would be the only other request."""
    dify.starts.append(start(*["running"] * 3, "succeeded", cut=700))
    polls = iter(range(100))

    async def sometimes(request: Any) -> Any:
        if request.method == "GET" and "/workflows/run/" in request.path and next(polls) < 4:
            return await respond(503)(request)
        return await dify.respond_to(request)

    dify.misbehave_always(sometimes)


def test_retries_that_are_lowered_while_a_task_runs_do_not_make_a_second_run(dify: DifyStandIn) -> None:
    the_first_try_loses_sight_of_its_run(dify)
    result = run_dag(
        """
        class Redeployed(DifyRunWorkflowOperator):
            # As if the Dag file had been deployed with fewer retries between the two tries.
            def execute(self, context):
                if context["ti"].try_number > 1:
                    self.retries = 0
                received("retries", self.retries)
                return super().execute(context)

        Redeployed(
            task_id="run", inputs={}, poll_interval=0.05, max_consecutive_failures=3, retries=2, retry_delay=0
        )
        """
    )
    assert (result.state, result.tries["run"], result.received["retries"]) == ("success", 2, 0)
    assert len(dify.started) == 1
    assert dify.stopped == []


@pytest.mark.skipif(AIRFLOW_3_0, reason="its dag.test() takes the retry of a deferred task for its resumption")
def test_a_retry_whose_run_is_over_does_not_defer_again(dify: DifyStandIn) -> None:
    dify.starts.append(start("succeeded", cut=700))
    polls = []

    async def lose_sight(request: Any) -> Any:
        if request.method == "GET" and "/workflows/run/" in request.path:
            polls.append(request.path)
            if len(polls) <= 4:
                return await respond(503)(request)
        return await dify.respond_to(request)

    dify.misbehave_always(lose_sight)
    result = run_operator(retries=1, retry_delay=0, max_consecutive_failures=3, deferrable=True)
    assert result.tries["run"] == 2
    assert result.state == "success"
    assert len(dify.started) == 1
    # The retry's look for its run, and the worker's own: no trigger polled.
    assert len(polls) == 4 + 2


def test_a_retry_starts_a_new_run_when_the_first_trys_run_failed(
    dify: DifyStandIn, operator_way: dict[str, Any]
) -> None:
    if AIRFLOW_3_0 and operator_way:
        pytest.skip("Airflow 3.0's dag.test() takes the retry of a deferred task for its resumption")
    dify.starts.extend([start("running", cut=700), start("succeeded")])
    polls = iter(range(100))

    async def lose_sight(request: Any) -> Any:
        if request.method == "GET" and "/workflows/run/" in request.path and next(polls) < 4:
            dify.add_run("failed", run_id=dify.started[0].workflow_run_id)
            return await respond(503)(request)
        return await dify.respond_to(request)

    dify.misbehave_always(lose_sight)
    result = run_operator(retries=1, retry_delay=0, max_consecutive_failures=3, **operator_way)
    assert result.state == "success"
    assert result.tries["run"] == 2
    assert len(dify.started) == 2
    assert result.xcoms["run"]["workflow_run_id"] == dify.started[1].workflow_run_id
    assert [started.user[-2:] for started in dify.started] == ["/1", "/2"]


def test_fields_of_ones_own_are_rendered_and_go_along_with_the_start(dify: DifyStandIn) -> None:
    bodies: list[Any] = []

    async def note(request: Any) -> Any:
        bodies.append(json.loads(await request.read()))
        return await dify.respond_to(request)

    dify.misbehave(note, only="POST .*/run$")
    assert run_operator(extra_body={"files": [], "note": "{{ ti.task_id }}"}).state == "success"
    assert (bodies[0]["note"], bodies[0]["files"], bodies[0]["response_mode"]) == ("run", [], "streaming")
