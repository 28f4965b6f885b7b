"""One try of the operator, after another one was killed."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError, DifyTaskKilled
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import Deadline
from airflow_provider_dify.tasks.start import STATE_KEY, StartMemory, new_start
from airflow_provider_dify.tasks.task_try import RunningTask
from airflow_provider_dify.tasks.xcoms import TaskXComs
from tests.dify_stand_in import DifyStandIn, Start, respond
from tests.unit.test_starting import Store, arguments_of, context_of

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")


def task_in(context: Any, hook: DifyHook, seconds: float = 10.0, **arguments: Any) -> RunningTask:
    """Return a try of a task; by default one that does not wait for its run."""
    short = {"poll_interval": 0.05, "not_found_grace": 0.3, "max_consecutive_failures": 3, "waits": False}
    return RunningTask(
        arguments_of(**{**short, **arguments}),
        context,
        hook,
        Deadline.after(seconds),
        logging.getLogger(__name__),
        TaskXComs(SimpleNamespace(multiple_outputs=False, do_xcom_push=False), context),
    )


@contextlib.contextmanager
def task_of_try(
    number: int, *, has_memory: bool = True, after: RunningTask | None = None, age: float = 300.0, **arguments: Any
) -> Iterator[RunningTask]:
    """
    Make one try of a task, for the test to execute. It does not wait for its run.

    :param has_memory: whether this Airflow remembers starts.
    :param after: the try before it, with whose memory it works.
    :param age: seconds since its Dag run began.
    :param arguments: the operator's.
    """
    store = Store() if has_memory else None
    if after is not None:
        earlier: Any = after.context
        store = earlier.get("task_state_store")
    context = context_of(number, 2, store)
    context["dag_run"].start_date = datetime.now(timezone.utc) - timedelta(seconds=age)
    with DifyHook(retry_limit=0) as hook:
        yield task_in(context, hook, **arguments)


@contextlib.contextmanager
def retry_of_a_killed_start(store: Store | None = None) -> Iterator[RunningTask]:
    """Make the second try of a task whose first one was killed when it had just sent its start."""
    store = Store() if store is None else store
    first = context_of(1, 2, store)
    StartMemory(first).save(new_start(first["ti"], None, {"q": "1"}, (), time.time()))
    with DifyHook(retry_limit=0) as hook:
        yield task_in(context_of(2, 2, store), hook, not_found_grace=0.2, max_consecutive_failures=2)


class WatchedStore(Store):
    """Airflow's memory of a task, which lets something happen while it is written."""

    def __init__(self) -> None:
        super().__init__()
        self.during_message: Callable[[Any], None] = lambda value: None

    def set(self, key: str, value: Any) -> None:
        self.during_message(value)
        super().set(key, value)

    @property
    def names_run(self) -> bool:
        """Whether the start that it keeps has a run."""
        return bool(self.get(STATE_KEY, {}).get("workflow_run_id"))


def refuse(value: Any) -> None:
    raise RuntimeError("no Airflow")


# What Airflow's API server does while it is away.
FAILURES = ("refuses", "says_nothing")


def start_and_kill(dify: DifyStandIn, store: WatchedStore, prepare: Callable[[RunningTask], None], **ti: Any) -> None:
    """Execute a task's first try, whose run is running, until it is killed."""
    dify.starts.append(Start(statuses=("running",), cut="workflow_started", then="pings"))
    with DifyHook(retry_limit=0) as hook:
        task = task_in(context_of(1, ti["max_tries"], store), hook, 60.0, waits=True)
        prepare(task)
        with pytest.raises(DifyTaskKilled):
            task.execute()


def kill_while_airflow_is_away(
    dify: DifyStandIn, failure: str, caplog: pytest.LogCaptureFixture, *, max_tries: int
) -> None:
    """Kill a task's first try, whose run is running, while Airflow's API server is away."""
    caplog.set_level(logging.INFO)
    store = WatchedStore()

    def say_nothing_before_the_end(value: Any) -> None:
        until = time.monotonic() + 60
        while not dify.stopped and "keeps running for the retry" not in caplog.text and time.monotonic() < until:
            time.sleep(0.01)

    killed_at: list[float] = []

    def kill(task: RunningTask) -> None:
        while not store.names_run:
            time.sleep(0.01)
        store.during_message = refuse if failure == "refuses" else say_nothing_before_the_end
        killed_at.append(time.monotonic())
        task.kill()

    def prepare(task: RunningTask) -> None:
        threading.Thread(target=kill, args=(task,), daemon=True).start()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_AFTER_KILL", 0.5)
        start_and_kill(dify, store, prepare, max_tries=max_tries)
    # Airflow kills the process 5 seconds after it has asked it to end: there is no time to wait for an answer.
    assert time.monotonic() - killed_at[0] < 30


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("dialect", ["1.12.1", "1.14.2"], indirect=True)
def test_a_run_whose_stop_nobody_would_remember_is_left_to_the_retry(
    dify: DifyStandIn, dialect: str, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    # The record of a run that was stopped can stay running here, and the retry would wait for it.
    kill_while_airflow_is_away(dify, failure, caplog, max_tries=1)
    assert dify.stopped == []
    assert f"Workflow run {dify.started[0].workflow_run_id} keeps running for the retry of this task." in caplog.text


@pytest.mark.parametrize("dialect", ["1.14.2"], indirect=True)
def test_a_kill_in_the_middle_of_a_message_to_airflow_stops_the_run_after_the_message(
    dify: DifyStandIn, dialect: str
) -> None:
    store = WatchedStore()

    def prepare(task: RunningTask) -> None:
        def be_killed(value: Any) -> None:
            # A signal's handler runs in the thread that sends the message.
            if value["workflow_run_id"] and not value["stop_was_asked"] and not store.names_run:
                task.kill()
                time.sleep(0.5)

        store.during_message = be_killed

    start_and_kill(dify, store, prepare, max_tries=1)
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]
    assert store[STATE_KEY]["stop_was_asked"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize(("dialect", "max_tries"), [("1.14.2", 0), ("1.16.1", 1)], indirect=["dialect"])
def test_a_run_whose_stop_needs_no_memory_is_stopped_although_airflow_is_away(
    dify: DifyStandIn, dialect: str, max_tries: int, failure: str, caplog: pytest.LogCaptureFixture
) -> None:
    kill_while_airflow_is_away(dify, failure, caplog, max_tries=max_tries)
    assert dify.stopped == [(dify.started[0].task_id, dify.started[0].user)]


def test_a_retry_starts_nothing_as_long_as_the_log_can_not_say_what_the_killed_try_has_started(
    dify: DifyStandIn,
) -> None:
    looks = iter(range(1000))

    async def fail_after_the_first_look(request: Any) -> Any:
        return await dify.respond_to(request) if next(looks) == 0 else await respond(503)(request)

    dify.misbehave_always(fail_after_the_first_look, only="GET .*/logs")
    with retry_of_a_killed_start() as task, pytest.raises(DifyConnectionError):
        task.execute()
    assert dify.started == []


def test_a_retry_starts_a_run_once_the_log_has_shown_none_for_the_grace(dify: DifyStandIn) -> None:
    dify.misbehave(respond(503), times=3, only="GET .*/logs")
    store = Store()
    with retry_of_a_killed_start(store) as task, pytest.raises(DifyConnectionError):
        task.execute()
    assert dify.started == []
    with retry_of_a_killed_start(store) as task:
        task.execute()
    assert len(dify.started) == 1


@pytest.mark.parametrize(("failures", "starts"), [(0, 1), (2, 1), (3, 0)])
def test_a_try_looks_for_earlier_runs_through_as_many_failures_as_it_may_have(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, failures: int, starts: int
) -> None:
    # Each look asks for this try's run, too: Airflow may run a try twice.
    dify.misbehave(respond(503), times=2 * failures, only="GET .*/logs")
    # With a memory it would have to look for nothing, or for a start that it knows.
    with task_of_try(2, has_memory=False, max_consecutive_failures=2) as task, contextlib.ExitStack() as stack:
        if not starts:
            stack.enter_context(pytest.raises(DifyConnectionError, match="can't tell whether a run of an earlier"))
        task.execute()
    assert caplog.text.count("could not be looked up") == min(failures, 2)
    assert len(dify.started) == starts
