"""What a user of the sensor without a run's id sees in Airflow. Every Dag here runs for real."""

from __future__ import annotations

import threading
import time
from collections import deque
from datetime import datetime, timezone
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyWorkflowRunCannotSucceed,
)
from airflow_provider_dify.sensors.dify_latest import DifyLatestWorkflowRunSensor
from tests.airflow.airflow_runs import DagRunResult, run_dag
from tests.combinations import each_or_long
from tests.dify_stand_in import DifyStandIn, respond

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

BEGAN = time.time() - 600
OUTPUTS = {"answer": "héllo", "n": 1}


def run_latest(**arguments: Any) -> DagRunResult:
    arguments = {"task_id": "wait", "poke_interval": 0.1, "timeout": 20, "retries": 0, **arguments}
    arguments.setdefault("created_after", datetime.fromtimestamp(BEGAN, timezone.utc).isoformat())
    return run_dag(
        f"""
        wait = DifyLatestWorkflowRunSensor(**{arguments!r})

        @task
        def use(outputs):
            received("outputs", outputs)

        use(wait.output)
        """
    )


def add_run(dify: DifyStandIn, status: str, *, age: float, user: str = "somebody", **fields: Any) -> str:
    """Add a run to the log that was created so many seconds ago."""
    run_id = dify.add_run(status, user=user, created_at=int(time.time() - age), **fields)
    dify.log.sort(key=lambda run: run.now["created_at"] if run.now else 0)
    return run_id


def ends_later(dify: DifyStandIn, run_id: str, status: str, seconds: float = 0.7, **fields: Any) -> None:
    """Let a run end by the clock, whoever looks at it."""
    run = dify.runs[run_id]
    ended = dify.dialect_rules.run_detail(status, run_id, {"created_at": run.responses[0]["created_at"], **fields})  # type: ignore[index]
    run.responses = deque([run.responses[0], ended])
    run.duration = seconds
    run.polls = [time.monotonic()]


def test_the_latest_run_that_has_ended_passes_its_outputs_on(
    dify: DifyStandIn, dialect: str, sensor_way: dict[str, Any]
) -> None:
    dify.add_logged_runs(3, ending=BEGAN - 60)
    add_run(dify, "succeeded", age=300, outputs={"answer": "an earlier one"})
    latest = add_run(dify, "succeeded", age=100, outputs=OUTPUTS)
    add_run(dify, "running", age=5)
    result = run_latest(**sensor_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS
    assert result.xcoms["wait"]["workflow_run"]["id"] == latest
    assert result.xcoms["wait"]["answer"] == OUTPUTS["answer"]


def test_of_runs_that_were_created_in_the_same_second_it_takes_the_one_that_ended_last(dify: DifyStandIn) -> None:
    now = int(time.time())
    ended = [now - 30, now - 10, now - 20]
    runs = [add_run(dify, "succeeded", age=60, finished_at=at) for at in ended]
    assert len({dify.runs[run_id].now["created_at"] for run_id in runs}) == 1  # type: ignore[index]
    result = run_latest()
    assert result.xcoms["wait"]["workflow_run"]["id"] == runs[1]


def test_it_waits_until_a_run_that_fits_ends(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    dify.add_logged_runs(50, ending=BEGAN - 60)
    run_id = add_run(dify, "running", age=30)
    ends_later(dify, run_id, "succeeded", outputs=OUTPUTS)
    result = run_latest(**sensor_way)
    assert result.state == "success"
    assert result.received["outputs"] == OUTPUTS


@pytest.mark.parametrize(
    ("arguments", "number"),
    [
        ({"user": "nightly-7"}, 0),
        ({"user": "nightly-*"}, 1),
        ({"triggered_from": "schedule"}, 2),
        ({"statuses": ["succeeded"], "user": "nightly-*"}, 0),
    ],
)
def test_only_a_run_that_fits_counts(dify: DifyStandIn, arguments: dict[str, Any], number: int) -> None:
    runs = [
        add_run(dify, "succeeded", age=90, user="nightly-7"),
        add_run(dify, "partial-succeeded", age=80, user="nightly-8"),
        add_run(dify, "succeeded", age=70),
        add_run(dify, "succeeded", age=60),
    ]
    dify.runs[runs[2]].triggered_from = "schedule"
    result = run_latest(**arguments)
    assert result.xcoms["wait"]["workflow_run"]["id"] == runs[number]


def test_a_run_that_failed_fails_the_task_without_retry_unless_statuses_leave_it_out(
    dify: DifyStandIn, sensor_way: dict[str, Any]
) -> None:
    fine = add_run(dify, "succeeded", age=90, outputs=OUTPUTS)
    failed = add_run(dify, "failed", age=80, error="no such model")
    result = run_latest(**sensor_way, retries=3, on_failure_callback=None)
    assert result.states["wait"] == "failed"
    assert result.tries["wait"] == 1
    assert result.xcoms["wait"]["workflow_run"]["id"] == failed
    result = run_latest(**sensor_way, statuses=["succeeded", "partial-succeeded"])
    assert result.xcoms["wait"]["workflow_run"]["id"] == fine


def failure_of(**arguments: Any) -> BaseException:
    result = run_dag(
        f"""
        DifyLatestWorkflowRunSensor(task_id="wait", on_failure_callback=raised, **{arguments!r})
        """
    )
    assert result.states["wait"] == "failed"
    return result.raised["wait"][-1]


BASE = {"poke_interval": 0.1, "timeout": 20, "created_after": "2026-01-01T00:00:00+00:00"}


def test_a_timeout_says_what_was_waited_for(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    add_run(dify, "running", age=5, user="us")
    error = failure_of(
        **{**BASE, **sensor_way, "timeout": 0.5}, user="us", triggered_from=["app-run"], statuses=["failed"]
    )
    assert str(error) == (
        "The sensor has timed out after 0.5 seconds. There was not a run created since 2026-01-01T00:00:00+00:00, of "
        "user 'us', triggered from app-run that has ended as failed."
    )


def test_a_log_that_cannot_be_read_fails_the_task_after_several_polls(
    dify: DifyStandIn, sensor_way: dict[str, Any]
) -> None:
    dify.misbehave_always(respond(503))
    error = failure_of(**BASE, **sensor_way, max_consecutive_failures=2)
    assert isinstance(error, DifyConnectionError)


def test_an_outage_in_the_search_is_survived(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    add_run(dify, "succeeded", age=5, outputs=OUTPUTS)
    if sensor_way.get("mode") != "reschedule":
        dify.misbehave(respond(503), times=3)
    assert run_latest(**sensor_way).received["outputs"] == OUTPUTS


def test_a_refused_key_fails_without_retry(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    dify.api_keys.clear()
    assert isinstance(failure_of(**BASE, **sensor_way), DifyAuthenticationError)


def test_the_run_itself_says_why_it_failed(dify: DifyStandIn) -> None:
    run_id = add_run(dify, "failed", age=5, error="no such model")
    error = failure_of(**BASE)
    assert isinstance(error, DifyWorkflowRunCannotSucceed)
    assert str(error).startswith(f"no such model. Dify workflow run {run_id} failed")


def test_templates_are_rendered(dify: DifyStandIn) -> None:
    run_id = add_run(dify, "succeeded", age=5, user="nightly-x")
    add_run(dify, "succeeded", age=4)
    result = run_dag(
        """
        DifyLatestWorkflowRunSensor(
            task_id="wait", created_after="{{ params.since }}", user="{{ params.user }}-*", poke_interval=0.1
        )
        """,
        params={"since": datetime.fromtimestamp(BEGAN, timezone.utc).isoformat(), "user": "nightly"},
    )
    assert result.xcoms["wait"]["workflow_run"]["id"] == run_id


@pytest.mark.parametrize("moment", each_or_long(["None", "", "yesterday", "2026-13-01"], short=["None"]))
def test_a_moment_that_is_none_fails_at_once(moment: str) -> None:
    error = failure_of(**{**BASE, "created_after": moment})
    assert isinstance(error, DifyConfigurationError)
    assert "created_after must be a datetime or the ISO 8601 text of one" in str(error)


@pytest.mark.parametrize(
    "arguments",
    [{"statuses": ["success"]}, {"triggered_from": []}, {"start_from_trigger": True}, {"workflow_run_id": "x"}],
)
def test_arguments_that_cannot_work_fail_with_the_dag_file(arguments: dict[str, Any]) -> None:
    with pytest.raises(DifyConfigurationError):
        DifyLatestWorkflowRunSensor(task_id="wait", created_after="2026-01-01", **arguments)


def test_what_was_read_is_not_read_again(dify: DifyStandIn) -> None:
    for age in range(500, 400, -1):
        add_run(dify, "succeeded", age=age)
    run_id = add_run(dify, "running", age=10, user="us")

    def end_after_some_looks() -> None:
        while sum("created_at__before" not in request.path for request in list(dify.requests)) < 4:
            time.sleep(0.05)
        ends_later(dify, run_id, "succeeded", seconds=0, user="us")

    threading.Thread(target=end_after_some_looks, daemon=True).start()
    result = run_latest(user="u*")
    assert result.xcoms["wait"]["workflow_run"]["id"] == run_id
    pages = [request.path for request in dify.requests if "logs" in request.path]
    older = [path for path in pages if "created_at__before" in path]
    # Two looks at least, of which the first alone reads on.
    assert len(pages) - len(older) > 1
    assert len(older) == len(set(older)) == 5
