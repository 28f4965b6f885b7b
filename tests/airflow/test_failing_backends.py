"""What keeps a task's XComs or its state fails just after the start: no run is left alone, and none paid twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError
from tests.airflow.airflow_processes import AIRFLOW_2, AIRFLOW_3_0
from tests.airflow.airflow_runs import START_WAYS, run_operator
from tests.combinations import pairs
from tests.dify_stand_in import DifyStandIn, Start, respond

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")


class BackendError(Exception):
    """What a backend of one's own raises."""


@pytest.fixture
def fail_xcoms(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the XCom backend fail for a key, so many times."""
    if AIRFLOW_2:
        from airflow.models.xcom import BaseXCom
    else:
        from airflow.sdk.bases.xcom import BaseXCom

    def fail(failing_key: str, times: int = 1) -> None:
        # What a backend of one's own overrides; the first is that of Airflow 3.4.
        hook = "store_value" if hasattr(BaseXCom, "store_value") else "serialize_value"
        store = getattr(BaseXCom, hook)
        failures = iter(range(times))

        def store_or_fail(*args: Any, **kwargs: Any) -> Any:
            if failing_key in (*args, kwargs.get("key")) and next(failures, None) is not None:
                raise BackendError("the bucket is away")
            return store(*args, **kwargs)

        monkeypatch.setattr(BaseXCom, hook, staticmethod(store_or_fail))

    return fail


@pytest.fixture
def fail_task_state(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Let the task state fail once, at the write of this number."""
    accessors = pytest.importorskip("airflow.sdk.execution_time.context", reason="Airflow 2 has no task state")
    accessor = getattr(accessors, "TaskStateStoreAccessor", None)
    if accessor is None:
        pytest.skip("this Airflow has no task state")

    def fail(number: int) -> None:
        save = accessor.set
        writes = iter(range(1, 1000))

        def set_or_fail(self: Any, *args: Any, **kwargs: Any) -> Any:
            if next(writes) == number:
                raise BackendError("the database is away")
            return save(self, *args, **kwargs)

        monkeypatch.setattr(accessor, "set", set_or_fail)

    return fail


each_key = pytest.mark.parametrize(
    ("key", "start_way"),
    pairs(["workflow_run_id", "task_id", "dify-run-log"], list(START_WAYS)),
    indirect=["start_way"],
)


def assert_stopped(dify: DifyStandIn, result: Any) -> None:
    assert result.states["run"] == "failed"
    assert [type(error) for error in result.raised["run"]] == [BackendError]
    (started,) = dify.started
    assert dify.stopped == [(started.task_id, started.user)]


@each_key
def test_a_last_try_whose_xcom_backend_fails_stops_its_run(
    dify: DifyStandIn, start_way: dict[str, Any], key: str, fail_xcoms: Callable[..., None]
) -> None:
    dify.starts.append(Start(statuses=("running",), duration=30))
    fail_xcoms(key)
    assert_stopped(dify, run_operator(retries=0, **start_way))


def test_a_last_try_whose_task_state_fails_stops_its_run(
    dify: DifyStandIn, start_way: dict[str, Any], fail_task_state: Callable[[int], None]
) -> None:
    dify.starts.append(Start(statuses=("running",), duration=30))
    # The first write comes before the start.
    fail_task_state(2)
    assert_stopped(dify, run_operator(retries=0, **start_way))


def test_a_task_state_that_fails_before_the_start_starts_nothing(
    dify: DifyStandIn, start_way: dict[str, Any], fail_task_state: Callable[[int], None]
) -> None:
    fail_task_state(1)
    result = run_operator(retries=1, retry_delay=0, **start_way)
    assert result.state == "success"
    assert [type(error) for error in result.raised["run"]] == [BackendError]
    assert len(dify.started) == 1


@each_key
def test_a_retry_finds_the_run_of_a_try_whose_xcom_backend_failed(
    dify: DifyStandIn, start_way: dict[str, Any], key: str, fail_xcoms: Callable[..., None]
) -> None:
    if AIRFLOW_3_0 and "deferrable" in start_way:
        pytest.skip("Airflow 3.0's dag.test() takes the retry of a deferred task for its resumption")
    dify.starts.append(Start(statuses=("running", "running", "succeeded"), duration=0.4))
    fail_xcoms(key)
    result = run_operator(retries=1, retry_delay=0, **start_way)
    assert result.state == "success"
    assert result.tries["run"] == 2
    assert len(dify.started) == 1
    assert dify.stopped == []


def test_a_retry_finds_the_run_of_a_try_whose_task_state_failed(
    dify: DifyStandIn, start_way: dict[str, Any], fail_task_state: Callable[[int], None]
) -> None:
    dify.starts.append(Start(statuses=("running", "running", "succeeded"), duration=0.4))
    fail_task_state(2)
    result = run_operator(retries=1, retry_delay=0, **start_way)
    assert result.state == "success"
    assert len(dify.started) == 1
    assert dify.stopped == []


def test_a_stop_that_fails_does_not_hide_why_the_task_failed(
    dify: DifyStandIn,
    monkeypatch: pytest.MonkeyPatch,
    everything_said: Callable[[], str],
) -> None:
    def fail(*_: Any) -> Any:
        raise BackendError("no thread could be started")

    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.stop_start", fail)
    dify.starts.append(Start(statuses=("running",), cut=2000))
    dify.misbehave_always(respond(503), only="GET .*/workflows/run/")
    result = run_operator(max_consecutive_failures=1, retries=0)
    assert [type(error) for error in result.raised["run"]] == [DifyConnectionError]
    (started,) = dify.started
    run = f"The workflow run of user {started.user!r}"
    assert f"{run} could not be stopped and keeps running: BackendError: no thread" in everything_said()
