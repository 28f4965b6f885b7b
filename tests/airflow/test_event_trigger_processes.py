"""Runs that others start trigger a Dag, with a real scheduler, Dag processor and triggerer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests

from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses, airflow_processes
from tests.airflow.shared_airflow import KEY, SETTINGS, Scenario, SharedAirflow
from tests.combinations import each_or_long
from tests.dify_stand_in import DifyStandIn, Start

pytestmark = [
    pytest.mark.airflow_processes,
    pytest.mark.skipif(AIRFLOW_2, reason="Airflow 2 starts no Dag on an event"),
]

# Seconds of an outage of Dify that one triggerer lives through; none by default, where the triggerer is killed in one.
OUTAGE = float(os.environ.get("EVENTS_OUTAGE", "0"))
RUNS_A_MINUTE = 500
# Three pages; 500 make it a whole minute.
BURST = int(os.environ.get("EVENTS_BURST", "60"))

DAG = """
import json
import pendulum
from airflow.sdk import Asset, AssetWatcher, dag, task
from airflow_provider_dify.triggers.dify_events import DifyWorkflowRunsTrigger

every = DifyWorkflowRunsTrigger({conn_id!r}, poll_interval={poll}, lookback={lookback})
runs = Asset("runs", watchers=[AssetWatcher(name="all", trigger=every)])
nightly = DifyWorkflowRunsTrigger(
    {conn_id!r}, poll_interval={poll}, user="nightly-*", statuses=["succeeded"], lookback={lookback}
)
nights = Asset("nights", watchers=[AssetWatcher(name="nightly", trigger=nightly)])


def consumer(asset):
    @dag(dag_id=f"use_{{asset.name}}", schedule=[asset], start_date=pendulum.datetime(2026, 1, 1), catchup=False)
    def use():
        @task
        def keep(triggering_asset_events=None):
            with open({received!r}, "a") as file:
                for events in triggering_asset_events.values():
                    for event in events:
                        file.write(json.dumps([asset.name, event.extra.get("payload", event.extra)]) + "\\n")

        keep()

    return use()


consumer(runs)
consumer(nights)
# One that an HTTP node in Dify creates events of.
consumer(Asset("called"))
"""
EXAMPLE = Path(__file__).parent.parent.parent / "example_dags" / "example_dify_runs_as_events.py"


@dataclass
class Watched:
    """What was started at Dify, and what the Dags received."""

    scenario: Scenario
    file: Path
    started: dict[str, list[str]] = field(default_factory=dict)

    @property
    def airflow(self) -> AirflowProcesses:
        return self.scenario.airflow

    @property
    def dify(self) -> DifyStandIn:
        return self.scenario.dify

    @property
    def received(self) -> list[tuple[str, dict[str, object]]]:
        """The events that tasks read: the asset's name, and the payload."""
        return [(name, payload) for name, payload in map(json.loads, self.file.read_text().splitlines())]

    def ids(self, asset: str = "runs") -> list[str]:
        return [str(payload["workflow_run_id"]) for name, payload in self.received if name == asset]

    def start_runs(self, phase: str, count: int, user: str = "somebody", **start: object) -> list[str]:
        """Start runs as another program does."""
        self.dify.starts.extend([Start(**start)] * count)  # type: ignore[arg-type]
        before = len(self.dify.log)
        for _ in range(count):
            threading.Thread(target=self._start, args=(user,), daemon=True).start()
        until = time.monotonic() + 120
        while len(self.dify.log) < before + count:
            assert time.monotonic() < until
            time.sleep(0.05)
        ids = [run.id for run in self.dify.log[before:]]
        self.started.setdefault(phase, []).extend(ids)
        return ids

    def _start(self, user: str) -> None:
        body = {"inputs": {}, "response_mode": "streaming", "user": user}
        headers = {"Authorization": f"Bearer {KEY}"}
        url = f"{self.dify.base_url}/workflows/run"
        # An outage ends the stream, and not the run.
        with contextlib.suppress(requests.RequestException):
            requests.post(url, json=body, headers=headers, timeout=60)

    def wait_until_received(self, *but: str, seconds: float = 180.0) -> None:
        """Wait until the Dag has received every run, but those of some phases."""

        def missing() -> dict[str, list[str]]:
            received = set(self.ids())
            found = {phase: [run_id for run_id in ids if run_id not in received] for phase, ids in self.started.items()}
            return {phase: ids for phase, ids in found.items() if ids and phase not in but}

        try:
            self.scenario.wait_for(lambda: not missing(), seconds)
        except AssertionError as error:
            stored = self.airflow.query("SELECT extra FROM asset_event")
            events = {run_id: run_id in str(stored) for ids in missing().values() for run_id in ids}
            raise AssertionError(f"Not received: {missing()}; whether Airflow has an event of it: {events}") from error


@pytest.fixture(scope="module", params=each_or_long(["in peace", "through outages"], short=["in peace"]))
def watched(
    request: pytest.FixtureRequest, shared: SharedAirflow, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Watched]:
    """An Airflow that received every run."""
    received = tmp_path_factory.mktemp("received") / "received.jsonl"
    received.touch()
    if request.param == "in peace":
        with shared.scenario("events", dialect="1.16.1") as scenario:
            watched = Watched(scenario, received)
            watch(watched)
            yield watched
        return
    # Its triggerer is killed.
    with DifyStandIn("1.16.1") as dify:
        dify.api_keys = {KEY}
        fields = json.dumps({"conn_type": "dify", "host": dify.base_url, "password": KEY})
        with airflow_processes({**SETTINGS, "AIRFLOW_CONN_DIFY_DEFAULT": fields}) as airflow:
            watched = Watched(Scenario(airflow, dify, "events", "dify_default"), received)
            watch(watched)
            live_through_outages(watched)
            yield watched


def watch(watched: Watched) -> None:
    """Let others start runs of all kinds once the Dags watch."""
    scenario, airflow, dify = watched.scenario, watched.airflow, watched.dify
    dify.add_logged_runs(100, ending=time.time() - 3600)
    lookback = 0 if keeps_state() else 300
    scenario.add_dag(DAG, received=str(watched.file), lookback=lookback, poll=1)
    example = EXAMPLE.read_text(encoding="utf-8").replace("poll_interval=30", "poll_interval=1")
    example = example.replace("DifyHook()", 'DifyHook("dify_default")').replace("dify_default", scenario.conn_id)
    (airflow.dags / EXAMPLE.name).write_text(example)
    of_events = "triggerer_id IS NOT NULL AND classpath LIKE '%DifyWorkflowRunsTrigger'"
    three = f"SELECT count(*) FROM trigger WHERE {of_events}"
    scenario.wait_for(lambda: airflow.query(three) == [(3,)] and have_looked(airflow, dify), seconds=240)

    watched.start_runs("quick", 3, duration=0.5)
    watched.start_runs("nightly", 2, user="nightly-1", duration=0.5)
    for run_id in watched.start_runs("scheduled", 2, duration=2.0):
        dify.runs[run_id].triggered_from = "schedule"
    watched.start_runs("failed", 1, recording="run_streaming_failed", duration=0.5)
    long = watched.start_runs("long", 1, duration=3600.0)
    paused = watched.start_runs("paused", 1, recording="run_streaming_paused", duration=0.5)
    watched.wait_until_received("long", "paused")
    assert not {*long, *paused} & set(watched.ids())
    end_run(dify, paused[0], "paused")
    end_run(dify, long[0], "running")
    watched.wait_until_received()
    # As an HTTP node at the end of a workflow does.
    call_airflow(airflow, "called", {"workflow_run_id": long[0]})
    scenario.wait_for(
        lambda: watched.ids("called") and len(used(watched)) == 2 and len(set(watched.ids("nights"))) == 2, seconds=180
    )


def live_through_outages(watched: Watched) -> None:
    """Let runs start faster than Dify's log has pages, and go on while Dify and the triggerer are away."""
    airflow, dify = watched.airflow, watched.dify
    # Three pages of newer ones, as fast as they may come.
    for _ in range(BURST):
        watched.started.setdefault("burst", []).extend(dify.add_logged_runs(1))
        time.sleep(60 / RUNS_A_MINUTE)
    watched.wait_until_received()
    airflow.wait_for(lambda: is_stored(airflow, watched.started["burst"][-1]), seconds=60)

    # Dify goes away, and the triggerer, too; both come back, and what happened in between is there.
    looked = looks(dify)
    airflow.wait_for(lambda: looks(dify) > looked, seconds=60)
    with dify.refusing_connections():
        watched.started["outage"] = dify.add_logged_runs(5)
        time.sleep(5)
        airflow.stop("triggerer", signal.SIGKILL)
        watched.started["while no triggerer was there"] = dify.add_logged_runs(3)
        airflow.start("triggerer")
        time.sleep(5)
    watched.wait_until_received()
    if OUTAGE:
        with dify.refusing_connections():
            watched.started["long outage"] = dify.add_logged_runs(5)
            time.sleep(OUTAGE)
        watched.wait_until_received()
    # One too many would come now.
    time.sleep(8)


def call_airflow(airflow: AirflowProcesses, asset: str, extra: dict[str, str]) -> None:
    """Create an event of an asset, with the requests that docs/reacting-to-runs.md describes."""
    found = airflow.ask_api("GET", f"/assets?name_pattern={asset}")
    airflow.ask_api("POST", "/assets/events", {"asset_id": found["assets"][0]["id"], "extra": extra})


def looks(dify: DifyStandIn) -> int:
    return sum("page=1&" in request.path for request in list(dify.requests))


def have_looked(airflow: AirflowProcesses, dify: DifyStandIn) -> bool:
    """Return whether each watcher has looked, so that what ends from now on is news to it."""
    if not keeps_state():
        # What a first look finds is news there (lookback).
        return looks(dify) > 0
    return airflow.query("SELECT count(*) FROM asset_state_store") == [(3,)]


def is_stored(airflow: AirflowProcesses, run_id: str) -> bool:
    """Return whether each watcher has stored that it knows a run; before Airflow 3.3.2 none does."""
    values = airflow.query("SELECT value FROM asset_state_store") if keeps_state() else []
    return all(run_id in value for (value,) in values)


def keeps_state() -> bool:
    """Whether an event trigger of this Airflow has a place for its state."""
    try:
        from airflow.sdk.execution_time.context import AssetStateStoreAccessors
    except ImportError:
        return False
    return hasattr(AssetStateStoreAccessors, "aget")


def end_run(dify: DifyStandIn, run_id: str, status: str) -> None:
    """Let a run end, a paused one as when a person has sent its form."""
    run = dify.runs[run_id]
    detail = run.now
    assert detail is not None
    assert detail["status"] == status
    fields = {"created_at": detail["created_at"], "finished_at": int(time.time())}
    run.responses = deque([dify.dialect_rules.run_detail("succeeded", run_id, fields)])


def test_each_run_that_others_start_triggers_the_dag(watched: Watched) -> None:
    missing = {
        phase: [run_id for run_id in ids if run_id not in watched.ids()] for phase, ids in watched.started.items()
    }
    assert not any(missing.values()), missing


@pytest.mark.skipif(not keeps_state(), reason="this Airflow keeps no state of an event trigger")
def test_no_run_triggers_it_twice(watched: Watched) -> None:
    assert [run_id for run_id, count in Counter(watched.ids()).items() if count > 1] == []


def test_what_ended_before_the_watch_triggers_nothing(watched: Watched) -> None:
    started = {run_id for ids in watched.started.values() for run_id in ids}
    assert set(watched.ids()) <= started


def test_filters_choose_which_runs_trigger_it(watched: Watched) -> None:
    assert sorted(set(watched.ids("nights"))) == sorted(watched.started["nightly"])


def used(watched: Watched) -> set[str]:
    """Return the runs that the example has read."""
    rows = watched.airflow.query(
        "SELECT value FROM xcom WHERE dag_id = ? AND task_id = 'use' AND key = 'return_value'", EXAMPLE.stem
    )
    return {json.loads(value)["run"] for (value,) in rows}


def test_the_example_reads_the_runs_that_started_it(watched: Watched) -> None:
    assert used(watched) == set(watched.started["scheduled"])


def test_an_event_that_dify_itself_creates_has_the_runs_id(watched: Watched) -> None:
    assert watched.ids("called") == watched.started["long"]


def test_events_have_no_outputs_and_no_key_is_written_anywhere(watched: Watched) -> None:
    for asset, payload in watched.received:
        if asset == "called":
            continue
        assert payload.keys() == {
            "workflow_run_id",
            "status",
            "user",
            "triggered_from",
            "total_tokens",
            "elapsed_time",
            "created_at",
            "finished_at",
        }
    for path, content in watched.airflow.everything_written():
        assert KEY.encode() not in content, path
