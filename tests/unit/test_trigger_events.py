"""The event trigger, on an event loop of the test's own, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import requests

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER, EVENT_TRIGGERS_HAVE_QUEUES
from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.hooks import dify_async
from tests.dify_stand_in import API_KEY, DifyStandIn, rejects, respond
from tests.unit.test_trigger import run as run_on_loop
from tests.unit.test_trigger import until

if not CAN_END_FROM_TRIGGER:
    pytest.skip("this Airflow has no event triggers", allow_module_level=True)

from airflow_provider_dify.triggers import dify_events
from airflow_provider_dify.triggers.dify_events import DifyWorkflowRunsTrigger

pytestmark = pytest.mark.usefixtures("dify_connection")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "retry_delay", 0.01)
    monkeypatch.setattr("airflow_provider_dify.runs.log.RETRY_DELAY", 0.01)
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "settle_delay", 0.0)
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "scheduler_delay", 0.0)
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "_until_next_look", lambda self, now: 0.05)
    monkeypatch.setattr(dify_async, "SHARED_SECONDS", 0.02)
    monkeypatch.setattr(dify_async, "FRESH_SECONDS", 0.2)
    monkeypatch.setattr(dify_events, "_windows", {})


def trigger_of(**arguments: Any) -> DifyWorkflowRunsTrigger:
    trigger = DifyWorkflowRunsTrigger(**arguments)
    # The triggerer's own logger goes past pytest on Airflow 3.
    trigger._log = logging.getLogger("watch")
    return trigger


class StateStore:
    """What Airflow's asset state store does for one asset."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}

    async def aget(self, key: str, default: Any = None) -> Any:
        await asyncio.sleep(0)
        return json.loads(self.values[key]) if key in self.values else default

    async def aset(self, key: str, value: Any) -> None:
        await asyncio.sleep(0)
        self.values[key] = json.dumps(value)


def start_run(dify: DifyStandIn, user: str = "somebody") -> str:
    """Start a run as another program does; it ends within the stand-in's ``run_duration``."""
    body = {"inputs": {}, "response_mode": "streaming", "user": user}
    headers = {"Authorization": f"Bearer {API_KEY}"}
    with requests.post(
        f"{dify.base_url}/workflows/run", json=body, headers=headers, stream=True, timeout=10
    ) as response:
        assert response.ok
        for line in response.iter_lines():
            if b"workflow_run_id" in line:
                return str(json.loads(line.removeprefix(b"data: "))["workflow_run_id"])
    raise AssertionError("The stand-in named no run.")


def first_look_of(trigger: DifyWorkflowRunsTrigger) -> asyncio.Event:
    """Return an event that is set once the trigger has looked, or could not."""
    looked = asyncio.Event()

    def noting(method: Callable[..., Any]) -> Callable[..., Any]:
        def note(*arguments: Any) -> Any:
            looked.set()
            return method(*arguments)

        return note

    for name in ("_on_look", "_on_failure"):
        setattr(trigger, name, noting(getattr(trigger, name)))
    return looked


def wait_until(holds: Callable[[], bool]) -> None:
    """Wait in a thread until something holds, however busy this machine is."""
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


async def watch(
    triggers: list[DifyWorkflowRunsTrigger], act: Callable[[], Any], count: int, seconds: float = 30.0
) -> list[list[dict[str, Any]]]:
    """Let triggers run until they have sent so many events together, after an act that begins once they have looked."""
    events: list[list[dict[str, Any]]] = [[] for _ in triggers]

    async def run(number: int) -> None:
        async for event in triggers[number].run():
            events[number].append(event.payload)

    looked = [first_look_of(trigger) for trigger in triggers]
    tasks = [asyncio.create_task(run(number)) for number in range(len(triggers))]
    try:
        await until(lambda: all(event.is_set() for event in looked))
        await asyncio.to_thread(act)
        deadline = time.monotonic() + seconds
        while sum(map(len, events)) < count and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
        # One too many would come now.
        await asyncio.sleep(0.3)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return events


def events_of(trigger: DifyWorkflowRunsTrigger, act: Callable[[], Any], count: int, seconds: float = 30.0) -> list[Any]:
    (events,) = run_on_loop(watch([trigger], act, count, seconds))
    return events


def test_each_run_that_ends_is_one_event_without_outputs(dify: DifyStandIn, dialect: str) -> None:
    dify.add_logged_runs(30)
    dify.run_duration = 0.2
    started: list[str] = []
    events = events_of(trigger_of(), lambda: started.extend(start_run(dify, f"user-{n}") for n in range(3)), 3)
    assert sorted(event["workflow_run_id"] for event in events) == sorted(started)
    assert sorted(event["user"] for event in events) == ["user-0", "user-1", "user-2"]
    for event in events:
        assert list(event) == [
            "workflow_run_id",
            "status",
            "user",
            "triggered_from",
            "total_tokens",
            "elapsed_time",
            "created_at",
            "finished_at",
        ]
        assert (event["status"], event["triggered_from"]) == ("succeeded", "app-run")
        assert json.loads(json.dumps(event)) == event


def add_ended(dify: DifyStandIn, status: str, user: str, triggered_from: str) -> str:
    (run_id,) = dify.add_logged_runs(1, user=user, status=status)
    dify.runs[run_id].triggered_from = triggered_from
    return run_id


RUNS = [
    ("succeeded", "nightly-1", "app-run"),
    ("failed", "nightly-2", "app-run"),
    ("succeeded", "somebody", "schedule"),
    ("stopped", "nightly", "webhook"),
    ("partial-succeeded", "nightly-", "app-run"),
]


@pytest.mark.parametrize(
    ("arguments", "numbers"),
    [
        pytest.param({}, [0, 1, 2, 3, 4], marks=pytest.mark.long),
        pytest.param({"statuses": ["succeeded", "partial-succeeded"]}, [0, 2, 4], marks=pytest.mark.long),
        ({"statuses": "failed"}, [1]),
        pytest.param({"triggered_from": "schedule"}, [2], marks=pytest.mark.long),
        ({"triggered_from": ["schedule", "webhook"]}, [2, 3]),
        ({"user": "nightly"}, [3]),
        ({"user": "nightly-*"}, [0, 1, 4]),
        pytest.param({"user": "*"}, [0, 1, 2, 3, 4], marks=pytest.mark.long),
        ({"user": "nightly-*", "statuses": ["succeeded"], "triggered_from": ["app-run"]}, [0]),
    ],
)
def test_filters_choose_which_runs_are_events(dify: DifyStandIn, arguments: dict[str, Any], numbers: list[int]) -> None:
    ids: list[str] = []
    events = events_of(trigger_of(**arguments), lambda: ids.extend(add_ended(dify, *run) for run in RUNS), len(numbers))
    assert sorted(event["workflow_run_id"] for event in events) == sorted(ids[number] for number in numbers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"statuses": ["success"]}, "statuses must be some of failed, partial-succeeded, stopped, succeeded"),
        ({"statuses": ["running"]}, "statuses must be some of"),
        ({"statuses": []}, "statuses must be a list of texts"),
        ({"statuses": 3}, "statuses must be a list of texts"),
        ({"triggered_from": [1]}, "triggered_from must be a list of texts"),
        ({"user": ""}, "user must be a text"),
        ({"poll_interval": 0}, "poll_interval must be 1 second or more"),
        ({"poll_interval": "30"}, "poll_interval must be a number of seconds"),
        ({"run_timeout": -1}, "run_timeout must be a number of seconds"),
    ],
)
def test_arguments_that_cannot_work_fail_with_the_dag_file(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(DifyConfigurationError, match=message):
        DifyWorkflowRunsTrigger(**arguments)


def test_what_is_serialized_makes_the_same_trigger_and_holds_no_secret() -> None:
    trigger = trigger_of(statuses=["succeeded", "failed"], triggered_from="webhook", user="us-*", lookback=60)
    path, arguments = trigger.serialize()
    assert path == f"{DifyWorkflowRunsTrigger.__module__}.{DifyWorkflowRunsTrigger.__name__}"
    assert DifyWorkflowRunsTrigger(**json.loads(json.dumps(arguments))).serialize() == (path, arguments)
    assert API_KEY not in json.dumps(arguments)


def test_the_order_of_statuses_makes_no_other_trigger() -> None:
    one, other = trigger_of(statuses=["succeeded", "failed"]), trigger_of(statuses=["failed", "succeeded"])
    assert one.serialize() == other.serialize()


@pytest.mark.parametrize("has_store", [True, False])
def test_a_trigger_that_is_made_again_goes_on_where_the_first_stopped(dify: DifyStandIn, has_store: bool) -> None:
    store = StateStore()

    def make() -> DifyWorkflowRunsTrigger:
        trigger = trigger_of()
        if has_store:
            trigger.asset_state_store = store
        return trigger

    dify.run_duration = 1.0
    seen: list[str] = []
    events = events_of(make(), lambda: seen.extend([add_ended(dify, *RUNS[0]), start_run(dify)]), 1)
    assert [event["workflow_run_id"] for event in events] == seen[:1]
    between = add_ended(dify, *RUNS[1])
    time.sleep(0.8)
    if has_store:
        dify_events._windows.clear()
    events = events_of(make(), lambda: None, 2)
    assert sorted(event["workflow_run_id"] for event in events) == sorted([seen[1], between])
    assert API_KEY not in str(store.values)


def test_what_was_sent_is_stored_only_after_airflow_had_time_to_keep_it(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "settle_delay", 30.0)
    for _ in range(2):
        # Killed before that, it sends the run again.
        trigger = trigger_of()
        act = (lambda: add_ended(dify, *RUNS[0])) if not dify.log else (lambda: None)
        assert len(events_of(trigger, act, 1)) == 1


def test_the_last_event_of_a_look_comes_when_the_scheduler_has_seen_the_first(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments: list[float] = []

    async def collect(delay: float) -> None:
        monkeypatch.setattr(DifyWorkflowRunsTrigger, "scheduler_delay", delay)
        monkeypatch.setattr(dify_events, "_windows", {})
        moments.clear()
        async for _ in trigger_of(lookback=60).run():
            moments.append(time.monotonic())
            if len(moments) == 4:
                return

    async def collect_three_of_four() -> None:
        task = asyncio.create_task(collect(600.0))
        await until(lambda: len(moments) == 3)
        # One too many would come now.
        await asyncio.sleep(0.3)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    monkeypatch.setenv("AIRFLOW__SCHEDULER__BATCH_ASSET_EVENTS", "True")
    dify.add_logged_runs(4, ending=time.time() - 3)
    run_on_loop(collect(0.5))
    assert moments[3] - moments[2] >= 0.5
    dify.log.clear()
    dify.add_logged_runs(4, ending=time.time() - 3)
    run_on_loop(collect_three_of_four())
    assert len(moments) == 3


@pytest.mark.skipif(not EVENT_TRIGGERS_HAVE_QUEUES, reason="before Airflow 3.4 a Dag run may be for several events")
def test_no_event_waits_where_each_has_a_dag_run_of_its_own(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "scheduler_delay", 600.0)
    dify.add_logged_runs(4, ending=time.time())
    assert len(events_of(trigger_of(lookback=60), lambda: None, 4)) == 4


def test_a_queue_is_told_to_airflow_where_it_has_queues_for_event_triggers() -> None:
    if not EVENT_TRIGGERS_HAVE_QUEUES:
        with pytest.raises(DifyConfigurationError, match=r"queue needs Airflow 3\.4"):
            trigger_of(queue="dify")
        return
    trigger = trigger_of(queue="dify")
    path, arguments = trigger.serialize()
    # Airflow reads the attribute, and takes a trigger with other arguments for another one.
    assert (trigger.queue, arguments["queue"]) == ("dify", "dify")
    assert DifyWorkflowRunsTrigger(**arguments).serialize() == (path, arguments)
    assert "queue" not in trigger_of().serialize()[1]


def test_lookback_sends_what_ended_before_the_first_look(dify: DifyStandIn) -> None:
    ids = dify.add_logged_runs(60)
    events = events_of(trigger_of(lookback=30), lambda: None, 30)
    assert {event["workflow_run_id"] for event in events} <= set(ids[-32:])
    assert len(events) in (29, 30, 31)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (respond(503), "This may pass"),
        (rejects(401, "unauthorized", "Access token is invalid"), "refused the API key"),
        (respond(200, b'{"data": "nonsense"}'), "Check the host"),
    ],
)
def test_a_trigger_that_cannot_work_says_so_once_a_minute_and_goes_on(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, fault: Any, message: str
) -> None:
    dify.misbehave_always(fault, only="logs")

    def act() -> None:
        dify.requests.clear()
        wait_until(lambda: len(dify.requests) > 3)
        add_ended(dify, *RUNS[0])
        dify.misbehave_always(None)
        dify.requests.clear()
        wait_until(lambda: len(dify.requests) > 1)

    trigger = trigger_of()
    events = events_of(trigger, act, 1, seconds=0)
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert message in warnings[0]
    assert API_KEY not in caplog.text
    # The first good look takes what has ended as known.
    assert events == []


def test_an_outage_of_dify_loses_no_run(dify: DifyStandIn) -> None:
    ids: list[str] = []

    def act() -> None:
        with dify.refusing_connections():
            ids.extend(add_ended(dify, *run) for run in RUNS)
            time.sleep(0.3)

    events = events_of(trigger_of(), act, len(RUNS))
    assert sorted(event["workflow_run_id"] for event in events) == sorted(ids)


def test_a_row_without_a_run_stops_nothing_and_its_run_is_an_event_once_it_has_a_record(dify: DifyStandIn) -> None:
    ids: list[str] = []
    (deleted,) = dify.add_logged_runs(1, ending=time.time() - 1)
    dify.runs[deleted].has_no_record = True

    def act() -> None:
        ids.extend(add_ended(dify, *run) for run in RUNS[:2])
        dify.runs[ids[0]].has_no_record = True
        time.sleep(0.5)
        dify.runs[ids[0]].has_no_record = False

    events = events_of(trigger_of(), act, 2)
    assert [event["workflow_run_id"] for event in events] == ids[::-1]


def test_a_filter_that_the_server_cannot_serve_is_named(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As Dify before 1.10.
    monkeypatch.setattr("tests.dify_stand_in.logs.HIDDEN", ("triggered_from",))
    assert events_of(trigger_of(triggered_from="schedule"), lambda: add_ended(dify, *RUNS[2]), 1, seconds=0.5) == []
    assert caplog.text.count("does not say what started the runs") == 1


def test_retry_after_is_kept(dify: DifyStandIn) -> None:
    dify.misbehave(respond(429, headers={"Retry-After": "60"}), only="logs")
    events_of(trigger_of(), lambda: time.sleep(0.5), 1, seconds=0.1)
    assert sum("logs" in request.path for request in dify.requests) == 1


def test_a_key_that_was_rotated_is_read_again(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    ids: list[str] = []

    def act() -> None:
        dify.api_keys = {"app-the-new-key"}
        connection = {"conn_type": "dify", "host": dify.base_url, "password": "app-the-new-key"}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
        ids.append(add_ended(dify, *RUNS[0]))

    events = events_of(trigger_of(), act, 1)
    assert [event["workflow_run_id"] for event in events] == ids


def test_another_host_is_found_when_the_old_one_is_gone(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with DifyStandIn() as moved, contextlib.ExitStack() as outage:
        ids: list[str] = []

        def act() -> None:
            outage.enter_context(dify.refusing_connections())
            connection = {"conn_type": "dify", "host": moved.base_url, "password": API_KEY}
            monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
            time.sleep(0.3)
            ids.append(add_ended(moved, *RUNS[0]))

        events = events_of(trigger_of(), act, 1)
        assert [event["workflow_run_id"] for event in events] == ids


@pytest.mark.parametrize("recording", ["app_info_chat", "app_info_chatflow"])
def test_the_key_of_an_app_without_a_log_is_named(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, recording: str
) -> None:
    with DifyStandIn("1.16.1") as dify:
        dify.app_info = recording
        connection = {"conn_type": "dify", "host": dify.base_url, "password": API_KEY}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(connection))
        assert events_of(trigger_of(), lambda: None, 1, seconds=0.5) == []
    assert caplog.text.count("Dify keeps a log of runs for apps of the mode 'workflow' only.") == 1


def test_watchers_of_one_app_share_one_reading(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DifyWorkflowRunsTrigger, "_until_next_look", lambda self, now: 0.25 - now % 0.25)
    monkeypatch.setattr(dify_async, "SHARED_SECONDS", 0.2)
    triggers = [trigger_of(), trigger_of(statuses=["failed"]), trigger_of(user="nightly-*")]
    dify.run_duration = 0.5

    def act() -> None:
        for run in RUNS:
            add_ended(dify, *run)
        start_run(dify)

    all_events, failed, nightly = run_on_loop(watch(triggers, act, 10))
    assert (len(all_events), len(failed), len(nightly)) == (6, 1, 3)
    shared = len(dify.requests)
    dify.requests.clear()
    monkeypatch.setattr(dify_events, "_windows", {})
    run_on_loop(watch([trigger_of()], act, 6))
    # Half as many again for moments at which one of the three was late.
    assert shared <= len(dify.requests) * 1.5


def test_a_watcher_that_ends_leaves_the_others_alone(dify: DifyStandIn) -> None:
    async def both() -> list[dict[str, Any]]:
        payloads: list[dict[str, Any]] = []

        async def collect(trigger: DifyWorkflowRunsTrigger) -> None:
            async for event in trigger.run():
                payloads.append(event.payload)  # noqa: PERF401 (as they come: the trigger never ends)

        staying = asyncio.create_task(collect(trigger_of()))
        for _ in range(20):
            passing = asyncio.create_task(collect(trigger_of(statuses=["failed"])))
            await asyncio.sleep(0.03)
            passing.cancel()
            await asyncio.gather(passing, return_exceptions=True)
        add_ended(dify, *RUNS[0])
        await until(lambda: bool(payloads))
        staying.cancel()
        await asyncio.gather(staying, return_exceptions=True)
        return payloads

    assert len(run_on_loop(both())) == 1


def test_a_state_store_that_fails_stops_nothing(dify: DifyStandIn, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(StateStore):
        async def aset(self, key: str, value: Any) -> None:
            raise RuntimeError("no database")

    trigger = trigger_of()
    trigger.asset_state_store = Broken()  # type: ignore[assignment]
    ids: list[str] = []
    events = events_of(trigger, lambda: ids.extend(add_ended(dify, *run) for run in RUNS), len(RUNS))
    assert sorted(event["workflow_run_id"] for event in events) == sorted(ids)
    assert caplog.text.count("RuntimeError: no database") >= 1


def test_looks_of_one_app_come_at_the_same_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    one, other = trigger_of(poll_interval=30), trigger_of(poll_interval=30, statuses=["failed"])
    moments = {
        round((now + trigger._until_next_look(now)) % 30, 3) for now in (0.0, 7.5, 1e9) for trigger in (one, other)
    }
    assert len(moments) == 1
    assert all(0 < one._until_next_look(now / 7) <= 30 for now in range(1000))


def test_a_run_that_never_ends_is_warned_of_once(dify: DifyStandIn, caplog: pytest.LogCaptureFixture) -> None:
    run_id = dify.add_run("running", user="somebody")
    assert dify.runs[run_id].responses == deque(dify.runs[run_id].responses)
    events_of(trigger_of(run_timeout=1), lambda: wait_until(lambda: "no longer watched" in caplog.text), 1, seconds=0)
    assert caplog.text.count(f"{run_id} is no longer watched") == 1
