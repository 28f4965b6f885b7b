"""What a user of the sensor sees in Airflow: states, XComs, messages. Every Dag here runs for real."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_PUSH_NONE
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyRequestError,
    DifyWorkflowRunCannotSucceed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
)
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor
from tests.airflow.airflow_processes import AIRFLOW_3_0
from tests.airflow.airflow_runs import SENSOR_WAYS, error_of, run_dag, run_operator, run_sensor
from tests.combinations import pairs
from tests.dify_stand_in import DifyStandIn, Recording, Start, html, replay, reset, respond

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

OUTPUTS = {"answer": "héllo 你好 🎉", "nested": {"items": [1, "二", None, {"a": 1.5}]}, "nothing": None}


@pytest.mark.parametrize("sensor_way", SENSOR_WAYS, indirect=True)
def test_a_succeeded_run_passes_its_outputs_to_the_next_task(
    dify: DifyStandIn, dialect: str, sensor_way: dict[str, Any]
) -> None:
    run_id = dify.add_run("running", "paused", "scheduled", "running", "succeeded", outputs=OUTPUTS)
    result = run_sensor(workflow_run_id=run_id, **sensor_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    # A deferred wait reads the finished run once more.
    assert len(dify.runs[run_id].polls) in (5, 6)
    recorded = Recording.load("detail_succeeded_echo", dialect).fields()
    workflow_run = result.xcoms["wait"].pop("workflow_run")
    assert workflow_run == {
        "id": run_id,
        "workflow_id": recorded["workflow_id"],
        "status": "succeeded",
        "error": None,
        "total_steps": 2,
        "total_tokens": 0,
        "elapsed_time": recorded["elapsed_time"],
        "created_at": datetime.fromtimestamp(recorded["created_at"], timezone.utc).isoformat(),
        "finished_at": datetime.fromtimestamp(recorded["finished_at"], timezone.utc).isoformat(),
    }
    each = {key: value for key, value in OUTPUTS.items() if CAN_PUSH_NONE or value is not None}
    assert result.xcoms["wait"] == {"return_value": OUTPUTS, **each}


def test_a_poke_mode_wait_uses_one_connection(dify: DifyStandIn) -> None:
    run_sensor(workflow_run_id=dify.add_run("running", "running", "running", "succeeded"))
    assert len(dify.requests) == 4
    assert dify.connections_opened == 1


def test_a_run_without_outputs_returns_an_empty_dict(dify: DifyStandIn, dialect: str) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("detail_succeeded_no_outputs"))
    assert result.state == "success"
    assert result.received["outputs"] == {}
    assert result.xcoms["wait"].keys() == {"return_value", "workflow_run"}


def test_an_output_named_as_our_own_xcom_keeps_the_outputs_whole(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("succeeded", outputs={"workflow_run": 1, "b": 2}), **sensor_way)
    assert result.state == "success"
    assert result.received["outputs"] == {"workflow_run": 1, "b": 2}
    assert result.xcoms["wait"]["workflow_run"]["status"] == "succeeded"
    assert result.xcoms["wait"]["b"] == 2


def test_multiple_outputs_can_be_turned_off(dify: DifyStandIn) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("succeeded", outputs=OUTPUTS), multiple_outputs=False)
    assert result.xcoms["wait"].keys() == {"return_value", "workflow_run"}


def test_nothing_is_pushed_without_xcom_push(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    run_id = dify.add_run("succeeded", outputs=OUTPUTS)
    result = run_dag(
        f"DifyWorkflowRunSensor(task_id='wait', workflow_run_id={run_id!r}, do_xcom_push=False, **{sensor_way!r})"
    )
    assert result.state == "success"
    assert result.xcoms == {}


def test_mapped_sensors_wait_on_several_runs_from_an_upstream_task(
    dify: DifyStandIn, sensor_way: dict[str, Any]
) -> None:
    runs = [dify.add_run("running", "succeeded", outputs={"n": n}) for n in range(3)]
    result = run_dag(
        f"""
        @task
        def start():
            return {runs!r}

        wait = DifyWorkflowRunSensor.partial(
            task_id="wait", poke_interval=0.05, **{sensor_way!r}, run_timeout=datetime.timedelta(days=1e4)
        ).expand(workflow_run_id=start())

        @task
        def use(outputs):
            received("outputs", list(outputs))

        use(wait.output)
        """
    )
    assert result.state == "success"
    assert result.received["outputs"] == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_the_run_id_may_be_a_template(dify: DifyStandIn) -> None:
    run_id = dify.add_run("succeeded", outputs=OUTPUTS)
    result = run_dag(
        """DifyWorkflowRunSensor(task_id="wait", workflow_run_id="{{ dag_run.conf['run'] }}")""", conf={"run": run_id}
    )
    assert result.state == "success"
    assert result.xcoms["wait"]["return_value"] == OUTPUTS


FAILURES = [
    pytest.param(
        ["running", "detail_failed"], {}, DifyWorkflowRunCannotSucceed, "Connection refused.*failed after", id="failed"
    ),
    pytest.param(
        ["detail_failed_parallel"], {}, DifyWorkflowRunCannotSucceed, "refused.*4 steps", id="failed-with-outputs"
    ),
    pytest.param(
        ["stopped"],
        {},
        DifyWorkflowRunCannotSucceed,
        "Aborted: (User requested stop|App task was stopped).*was stopped",
        id="stopped",
    ),
    pytest.param(
        ["partial-succeeded"],
        {"fail_on_partial_success": True},
        DifyWorkflowRunCannotSucceed,
        "fail_on_partial_success",
        id="partial-succeeded",
    ),
    pytest.param([None], {}, DifyWorkflowRunNotFound, "not know workflow run.*not_found_grace", id="not-found"),
    pytest.param([None], {"not_found_grace": 0.3}, DifyWorkflowRunNotFound, "still unknown", id="not-found-in-time"),
    pytest.param(["running"], {"run_timeout": 60}, DifyWorkflowRunTimeout, "still running.*orphaned", id="overdue"),
    pytest.param(["paused"], {"run_timeout": 60}, DifyWorkflowRunTimeout, "waits for a person", id="overdue-paused"),
]


@pytest.mark.parametrize(
    ("statuses", "arguments", "exception", "message", "sensor_way"),
    pairs(FAILURES, list(SENSOR_WAYS)),
    indirect=["sensor_way"],
)
def test_a_run_that_cannot_succeed_fails_the_task_without_retry(
    dify: DifyStandIn,
    dialect: str,
    sensor_way: dict[str, Any],
    statuses: list[str | None],
    arguments: dict[str, Any],
    exception: type[Exception],
    message: str,
) -> None:
    if dialect == "1.13.0" and exception is DifyWorkflowRunNotFound:
        pytest.skip("Dify 1.13.0 has a 500 for an unknown run, as for any fault")
    # Created long ago for every one that is not over.
    created = {} if statuses[-1] not in ("running", "paused") else {"created_at": 1_700_000_000}
    run_id = dify.add_run(*statuses, **created)
    result = run_sensor(workflow_run_id=run_id, **sensor_way, retries=2, retry_delay=0, **arguments)
    assert result.states["use"] == "upstream_failed"
    error = error_of(result, "wait")
    assert type(error) is exception
    assert re.search(message, str(error))
    assert run_id in str(error)
    assert re.search(r"\S See https://\S+/docs/failures\.md#[a-z-]+$", str(error))
    if isinstance(error, DifyWorkflowRunCannotSucceed):
        assert error.run is not None
        assert error.run.id == run_id
        assert result.xcoms["wait"]["workflow_run"]["status"] == error.run.status
        assert "return_value" not in result.xcoms["wait"]


@pytest.mark.parametrize("dialect", ["1.13.0"])
def test_a_run_that_dify_1_13_0_does_not_know_fails_the_task_as_a_fault_of_the_server(
    dify: DifyStandIn, dialect: str, sensor_way: dict[str, Any]
) -> None:
    run_id = dify.add_run(None)
    result = run_sensor(workflow_run_id=run_id, **sensor_way, max_consecutive_failures=1)
    assert result.states == {"wait": "failed", "use": "upstream_failed"}
    (error,) = result.raised["wait"]
    assert type(error) is DifyConnectionError
    assert run_id in str(error)


@pytest.mark.parametrize(("skip", "status"), pairs(["soft_fail", "never_fail"], ["failed", None]))
def test_soft_fail_and_never_fail_skip_on_a_run_that_cannot_succeed(
    dify: DifyStandIn, sensor_way: dict[str, Any], skip: str, status: str | None
) -> None:
    result = run_sensor(workflow_run_id=dify.add_run(status), **sensor_way, retries=2, retry_delay=0, **{skip: True})
    assert result.states["wait"] == "skipped"
    assert result.tries["wait"] == 1


def test_a_partial_success_is_a_success_with_a_warning(
    dify: DifyStandIn, dialect: str, everything_said: Callable[[], str]
) -> None:
    run_id = dify.add_run("partial-succeeded", outputs={"body": "the default body"})
    result = run_sensor(workflow_run_id=run_id)
    assert result.state == "success"
    assert result.received["outputs"]["body"] == "the default body"
    assert result.xcoms["wait"]["workflow_run"]["status"] == "partial-succeeded"
    assert "partial-succeeded" in everything_said()


def test_an_unknown_run_is_polled_during_the_grace_period(
    dify: DifyStandIn, dialect: str, sensor_way: dict[str, Any]
) -> None:
    run_id = dify.add_run(None, None, "running", "succeeded", outputs=OUTPUTS)
    result = run_sensor(workflow_run_id=run_id, **sensor_way, not_found_grace=60)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS


def test_an_unknown_status_is_polled_until_the_run_has_finished(dify: DifyStandIn, dialect: str) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("resuming", "succeeded", outputs=OUTPUTS))
    assert result.state == "success"
    result = run_sensor(workflow_run_id=dify.add_run("cancelled", finished_at=1_795_299_666))
    assert result.states["wait"] == "failed"
    assert "'cancelled', which this version" in str(result.raised["wait"][0])


REJECTIONS = [
    pytest.param("auth_bad_key", DifyAuthenticationError, "Access token is invalid", id="bad-key"),
    pytest.param("detail_disabled_api", DifyAuthenticationError, "API service has been disabled", id="api-off"),
    pytest.param("detail_key_of_chat_app", DifyRequestError, "not_workflow_app.*another kind", id="key-of-a-chat-app"),
]


@pytest.mark.parametrize(
    ("recording", "exception", "message", "sensor_way"), pairs(REJECTIONS, list(SENSOR_WAYS)), indirect=["sensor_way"]
)
def test_a_rejected_request_fails_the_task_without_retry(
    dify: DifyStandIn, sensor_way: dict[str, Any], recording: str, exception: type[Exception], message: str
) -> None:
    dify.misbehave(dify_response(dify))
    dify.misbehave_always(replay(recording))
    result = run_sensor(workflow_run_id=dify.add_run("running"), **sensor_way, retries=2, retry_delay=0)
    error = error_of(result, "wait")
    assert type(error) is exception
    assert re.search(message, str(error))
    assert isinstance(error, DifyRequestError)
    assert error.status_code in (400, 401, 403)
    assert error.code
    assert error.message
    assert len(dify.requests) == 2


@pytest.mark.parametrize(
    ("rendered", "sensor_way"),
    pairs(["", "None", "{{ none }}", "../../info", "not-a-uuid"], list(SENSOR_WAYS)),
    indirect=["sensor_way"],
)
def test_a_run_id_that_is_none_fails_before_any_request(
    dify: DifyStandIn, sensor_way: dict[str, Any], rendered: str
) -> None:
    result = run_sensor(workflow_run_id=rendered, **sensor_way, retries=2, retry_delay=0)
    error = error_of(result, "wait")
    assert isinstance(error, DifyConfigurationError)
    assert repr("None" if "none" in rendered else rendered) in str(error)
    assert dify.requests == []


def test_a_rotated_key_does_not_end_a_wait(
    dify: DifyStandIn, sensor_way: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = dify.add_run("running", "running", "succeeded", outputs=OUTPUTS)

    async def rotate(request: Any) -> Any:
        dify.api_keys = {"the-next-key"}
        connection = {"conn_type": "dify", "host": dify.base_url, "password": "the-next-key"}
        os.environ["AIRFLOW_CONN_DIFY_DEFAULT"] = json.dumps(connection)
        return await dify.respond_to(request)

    dify.misbehave(dify_response(dify), rotate)
    result = run_sensor(workflow_run_id=run_id, **sensor_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS


def test_failed_polls_in_poke_mode_are_retried(dify: DifyStandIn, dialect: str) -> None:
    run_id = dify.add_run("running", "running", "succeeded", outputs=OUTPUTS)
    # Four attempts a poll: five failed polls in a row, an answer, five more.
    dify.misbehave(respond(503), reset(), html(502), respond(500), times=5)
    dify.misbehave(dify_response(dify))
    dify.misbehave(respond(504), times=20)
    result = run_sensor(workflow_run_id=run_id, retries=0)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    assert len(dify.requests) == 20 + 1 + 20 + 2


def dify_response(dify: DifyStandIn) -> Any:
    async def fault(request: Any) -> Any:
        return await dify.respond_to(request)

    return fault


@pytest.mark.parametrize(
    ("way", "failed_requests"),
    [
        # A worker's poll asks four times, and a rescheduled one is a try of its own.
        ({"max_consecutive_failures": 2}, 4 * 3),
        ({"mode": "reschedule"}, 4),
        pytest.param(
            {"max_consecutive_failures": 2, "deferrable": True},
            4,
            marks=pytest.mark.skipif(AIRFLOW_3_0, reason="it takes the retry of a deferred task for its resumption"),
        ),
    ],
    ids=["poke", "reschedule", "deferrable"],
)
def test_one_failed_poll_too_many_ends_the_try_and_leaves_it_to_retries(
    dify: DifyStandIn, way: dict[str, Any], failed_requests: int
) -> None:
    if "deferrable" in way:
        dify.misbehave(dify_response(dify))
    dify.misbehave(respond(503), times=failed_requests)
    run_id = dify.add_run(*["running"] * ("deferrable" in way), "succeeded", outputs=OUTPUTS)
    result = run_sensor(workflow_run_id=run_id, retries=1, retry_delay=0, **way)
    assert result.state == "success"
    assert result.tries["wait"] == 2
    if way.get("mode") != "reschedule":
        (error,) = result.raised["wait"]
        assert type(error) is DifyConnectionError
        assert error.status_code == 503


def test_soft_fail_does_not_hide_a_temporary_failure(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    dify.misbehave(dify_response(dify))
    dify.misbehave_always(respond(503))
    result = run_sensor(
        workflow_run_id=dify.add_run("running"), **sensor_way, soft_fail=True, max_consecutive_failures=0
    )
    assert result.states["wait"] == "failed"


def test_silent_fail_keeps_waiting_after_any_number_of_failed_polls(
    dify: DifyStandIn, sensor_way: dict[str, Any]
) -> None:
    dify.misbehave(respond(503), times=8)
    result = run_sensor(
        workflow_run_id=dify.add_run("succeeded"), **sensor_way, silent_fail=True, max_consecutive_failures=0
    )
    assert result.state == "success"


def test_the_sensor_times_out_as_any_sensor(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    result = run_sensor(workflow_run_id=dify.add_run("running"), **sensor_way, timeout=0.3)
    assert result.states["wait"] == "failed"
    (error,) = result.raised["wait"]
    assert type(error).__name__ == "AirflowSensorTimeout"
    assert re.search(
        r"timed out after 0.3 seconds. Dify workflow run \S+ was not over: its last status was running", str(error)
    )
    result = run_sensor(workflow_run_id=dify.add_run("running"), **sensor_way, timeout=0.3, soft_fail=True)
    assert result.states["wait"] == "skipped"


@pytest.mark.parametrize(
    "arguments",
    [
        {"not_found_grace": -1},
        {"run_timeout": "soon"},
        {"run_timeout": float("nan")},
        {"max_consecutive_failures": -1},
        {"max_consecutive_failures": 2.5},
    ],
)
def test_a_wrong_argument_fails_when_the_dag_is_parsed(arguments: dict[str, Any]) -> None:
    from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

    with pytest.raises(ValueError, match=next(iter(arguments))):
        DifyWorkflowRunSensor(task_id="wait", workflow_run_id="x", **arguments)


@pytest.mark.parametrize(("interval", "warns"), [(5, True), (60, False), (300, False)])
def test_a_reschedule_interval_that_airflow_cannot_keep_is_warned_of_when_the_dag_is_parsed(
    interval: float, warns: bool
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        DifyWorkflowRunSensor(task_id="wait", workflow_run_id="r", mode="reschedule", poke_interval=interval)
    assert any("poke_interval=5 can fail" in str(warning.message) for warning in caught) == warns


@pytest.mark.parametrize("kind", [DifyWorkflowRunSensor, DifyRunWorkflowOperator])
def test_a_task_that_another_version_has_deferred_resumes(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    resume_execution = kind.resume_execution

    def resume(self: Any, next_method: str, next_kwargs: Any, context: Any) -> Any:
        # dag.test() returns nothing but the event of what a task was deferred with.
        return resume_execution(self, next_method, {**next_kwargs, "of_a_later_version": 1}, context)

    monkeypatch.setattr(kind, "resume_execution", resume)
    if kind is DifyWorkflowRunSensor:
        run_id = dify.add_run("running", "succeeded", outputs=OUTPUTS)
        result = run_sensor(workflow_run_id=run_id, deferrable=True, retries=0)
    else:
        dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": OUTPUTS}))
        result = run_operator(deferrable=True, retries=0)
    assert result.received["outputs"] == OUTPUTS
