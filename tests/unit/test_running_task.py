"""One try of the operator, after another one was killed."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.clock import TaskClock
from airflow_provider_dify.tasks.start import StartMemory, new_start
from airflow_provider_dify.tasks.task_try import RunningTask
from airflow_provider_dify.tasks.xcoms import TaskXComs
from tests.dify_stand_in import DifyStandIn, Start, respond
from tests.unit.test_starting import Store, context_of, settings_of

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")


def retry_of_a_killed_start(hook: DifyHook) -> RunningTask:
    """Return the second try of a task whose first one was killed when it had just sent its start."""
    store = Store()
    first = context_of(1, 2)
    StartMemory({**first, "task_state_store": store}).save(new_start(first["ti"], None, {"q": "1"}, (), time.time()))
    context: Any = context_of(2, 2, store)
    operator = SimpleNamespace(multiple_outputs=False, do_xcom_push=False)
    return RunningTask(
        settings_of(poll_interval=0.05, not_found_grace=0.2, max_consecutive_failures=2),
        context,
        hook,
        TaskClock(time.time() + 60),
        logging.getLogger(__name__),
        TaskXComs(operator, context),
    )


@contextlib.contextmanager
def task_of_try(
    number: int, *, has_memory: bool = True, after: RunningTask | None = None, age: float = 300.0, **settings: Any
) -> Iterator[RunningTask]:
    """
    Make one try of a task, for the test to start.

    :param has_memory: whether this Airflow remembers starts.
    :param after: the try before it, with whose memory it works.
    :param age: seconds since its Dag run began.
    :param settings: the operator's arguments.
    """
    store = Store() if has_memory else None
    if after is not None:
        earlier: Any = after.context
        store = earlier.get("task_state_store")
    context: Any = context_of(number, 2, store)
    context["dag_run"].start_date = datetime.now(timezone.utc) - timedelta(seconds=age)
    short = {"poll_interval": 0.05, "not_found_grace": 0.3, "max_consecutive_failures": 3}
    with DifyHook(retry_limit=0) as hook:
        task = RunningTask(
            settings_of(**{**short, **settings}),
            context,
            hook,
            TaskClock(time.time() + 10),
            logging.getLogger(__name__),
            TaskXComs(SimpleNamespace(multiple_outputs=False, do_xcom_push=False), context),
        )
        try:
            yield task
        finally:
            task.close()


class FailingStore(Store):
    """Airflow's memory of a task while its API server is away: it refuses, or says nothing for a while."""

    def __init__(self, failure: Callable[[], None]) -> None:
        super().__init__()
        self.failure: Callable[[], None] = failure
        self.is_away = False

    def set(self, key: str, value: Any) -> None:
        if self.is_away:
            self.failure()
        super().set(key, value)


def refuse() -> None:
    raise RuntimeError("no Airflow")


FAILURES: dict[str, Callable[[], None]] = {"refuses": refuse, "says_nothing": lambda: time.sleep(3)}


def kill_while_airflow_is_away(dify: DifyStandIn, failure: str, *, max_tries: int) -> RunningTask:
    """Kill a task's first try, whose run is running, while Airflow's API server is away."""
    dify.starts.append(Start(statuses=("running",)))
    store = FailingStore(FAILURES[failure])
    context: Any = context_of(1, max_tries, store)
    with DifyHook(retry_limit=0) as hook:
        task = RunningTask(
            settings_of(poll_interval=0.05),
            context,
            hook,
            TaskClock(time.time() + 60),
            logging.getLogger(__name__),
            TaskXComs(SimpleNamespace(multiple_outputs=False, do_xcom_push=False), context),
        )
        task.start()
        store.is_away = True
        began = time.monotonic()
        task.stop_after_kill()
        # Airflow kills the process 5 seconds after it has asked it to end.
        assert time.monotonic() - began < 5
        task.close()
    return task


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("dialect", ["1.12.1", "1.14.2"], indirect=True)
def test_a_run_whose_stop_nobody_would_remember_is_left_to_the_retry(
    dify: DifyStandIn, dialect: str, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The record of a run that was stopped can stay running here, and the retry would wait for it.
    caplog.set_level(logging.INFO)
    kill_while_airflow_is_away(dify, failure, max_tries=1)
    assert dify.stopped == []
    assert f"Workflow run {dify.started[0].workflow_run_id} goes on for the retry of this task." in caplog.text


@pytest.mark.parametrize("dialect", ["1.14.2"], indirect=True)
def test_a_kill_in_the_middle_of_a_message_to_airflow_stops_the_run_after_the_message(
    dify: DifyStandIn, dialect: str
) -> None:
    task = kill_while_airflow_is_away(dify, "says_nothing", max_tries=1)
    assert dify.stopped == []
    store: Any = task.context["task_state_store"]  # type: ignore[typeddict-item]
    store.is_away = False
    task.stop_after_message()
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]
    assert store["dify_workflow_run"]["stop_was_asked"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("dialect", "max_tries"), [("1.14.2", 0), ("1.16.1", 1)], indirect=["dialect"])
def test_a_run_whose_stop_needs_no_memory_is_stopped_although_airflow_is_away(
    dify: DifyStandIn, dialect: str, max_tries: int, failure: str
) -> None:
    kill_while_airflow_is_away(dify, failure, max_tries=max_tries)
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


def test_a_retry_starts_nothing_as_long_as_the_log_can_not_say_what_the_killed_try_has_started(
    dify: DifyStandIn,
) -> None:
    looks = iter(range(1000))

    async def fail_after_the_first_look(request: Any) -> Any:
        return await dify.respond_to(request) if next(looks) == 0 else await respond(503)(request)

    dify.misbehave_always(fail_after_the_first_look, only="GET .*/logs")
    with DifyHook(retry_limit=0) as hook, pytest.raises(DifyConnectionError):
        retry_of_a_killed_start(hook).start()
    assert dify.started == []


def test_a_retry_starts_a_run_once_the_log_has_shown_none_for_the_grace(dify: DifyStandIn) -> None:
    dify.misbehave(respond(503), times=3, only="GET .*/logs")
    with DifyHook(retry_limit=0) as hook:
        task = retry_of_a_killed_start(hook)
        with pytest.raises(DifyConnectionError):
            task.start()
        assert dify.started == []
        task.start()
        task.close()
    assert len(dify.started) == 1
