"""
Three hundred waits and fifty started runs on a cluster, while its processes are killed and Dify fails.

All of it happens once, in the fixture ``ended``; each test then looks at what became of it.
"""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest
from airflow_cluster import AirflowCluster  # noqa: TC002
from conftest import FIRST_KEY, SECOND_KEY, Say
from waits import CONN_ID, DAG_ID, OPERATORS, RETRIES, SENSORS, STATE_OF_TASK, Wait, waits, workflow_run_id

from tests.dify_stand_in import DifyStandIn, Recording, Start, Started, reset, respond

# How long each wait may take before the test calls it lost.
PATIENCE = 300
ALL = {wait.task_id: wait for wait in [*waits(SENSORS), *waits(OPERATORS)]}


@dataclass
class Ended:
    """What became of the tasks, of the runs, and of everything written down."""

    states: dict[str, str]
    xcoms: dict[tuple[str, str], Any]
    dify: DifyStandIn
    cluster: AirflowCluster


@pytest.fixture(scope="module")
def ended(say: Say, dify: DifyStandIn, cluster: AirflowCluster) -> Ended:
    """Let everything wait, do everything to it that is to be borne, end all runs, and collect what became of it."""
    events = _Events(say, dify, cluster)
    events.let_everything_wait()
    events.misbehave_sometimes()
    events.kill_a_triggerer()
    events.kill_a_worker()
    events.wait_for_the_survivors()
    events.restart_the_scheduler()
    events.stop_dify_for_20_seconds()
    events.rotate_the_key()
    events.end_all_runs()
    dify.misbehave_sometimes(0)
    rows = cluster.query("SELECT task_id, state, try_number FROM task_instance WHERE dag_id = %s", DAG_ID)
    xcoms = cluster.query("SELECT task_id, key, value::text FROM xcom WHERE dag_id = %s", DAG_ID)
    states = {task_id: state for task_id, state, _ in rows}
    count = Counter(states.values())
    repeated = sum(tries for *_, tries in rows) - len(rows)
    say(f"All is over: {count['success']} tasks succeeded, {count['failed']} failed, {repeated} tries were repeated.")
    say(f"Dify answered {len(dify.requests)} requests, {dify.fault_count} of them wrongly.")
    return Ended(
        states,
        {(task_id, key): json.loads(value) for task_id, key, value in xcoms},
        dify,
        cluster,
    )


class _Events:
    """What is done to the cluster and to Dify; a few runs end in each of the troubles, the rest after them."""

    def __init__(self, say: Say, dify: DifyStandIn, cluster: AirflowCluster) -> None:
        self.say, self.dify, self.cluster = say, dify, cluster
        self.to_end = list(ALL.values())
        self.killed: dict[str, int] = {}

    def let_everything_wait(self) -> None:
        for wait in waits(SENSORS):
            self.dify.add_run("running", run_id=workflow_run_id(wait.task_id))
        # The stream tells that the run has started, and then that it is alive. One for each operator, and more in case
        # that any starts two.
        first_event = Recording.load("run_streaming_echo").body.index(b"\n\n") + 2
        self.dify.starts.extend([Start(statuses=("running",), cut=first_event, then="pings")] * 500)
        self.cluster.unpause(DAG_ID)
        self.cluster.trigger(DAG_ID)
        self.say(f"{len(waits(SENSORS))} waits and {len(waits(OPERATORS))} runs are to start.")
        self.cluster.wait_for(self._all_are_waiting, seconds=PATIENCE)
        on_triggerers, on_workers = self._triggers(), len(self._tasks_on_workers())
        starts = len(self.cluster.tasks_run_on_workers()) + on_workers
        self.say(
            f"All of them wait at once: {' and '.join(map(str, on_triggerers))} on the triggerers, {on_workers} on the"
            f" workers; it took {starts} worker starts."
        )

    def _all_are_waiting(self) -> bool:
        ((waiting,),) = self.cluster.query(
            "SELECT count(*) FROM task_instance ti WHERE state = 'deferred' OR state = 'running' AND EXISTS"
            " (SELECT 1 FROM xcom WHERE xcom.task_id = ti.task_id AND key = 'workflow_run_id')"
        )
        return waiting == len(ALL)

    def _triggers(self) -> list[int]:
        rows = self.cluster.query("SELECT count(*) FROM trigger GROUP BY triggerer_id ORDER BY triggerer_id")
        return [count for (count,) in rows]

    def misbehave_sometimes(self) -> None:
        self.dify.misbehave_sometimes(0.05, respond(500), respond(502, "<html>"), respond(503), reset())
        self.say("From now on 5 % of the polls are answered with 500, 502, 503 or a reset.")

    def kill_a_triggerer(self) -> None:
        self.cluster.stop("triggerer-1", signal.SIGKILL)
        self.say("SIGKILL to a triggerer.")
        self._end_some()

    def kill_a_worker(self) -> None:
        # The one on which more tasks wait.
        on_workers: dict[str, dict[str, int]] = {}
        for task_id, try_number, pid in self._tasks_on_workers():
            on_workers.setdefault(self.cluster.process_of(pid), {})[task_id] = try_number
        worker, self.killed = max(on_workers.items(), key=lambda each: len(each[1]))
        self.cluster.stop(worker, signal.SIGKILL)
        self.say(f"SIGKILL to a worker and the {len(self.killed)} tasks on it.")
        self._end_some()

    def _tasks_on_workers(self) -> list[tuple[str, int, int]]:
        return self.cluster.query(
            "SELECT task_id, try_number, pid FROM task_instance WHERE state = 'running' AND pid IS NOT NULL"
        )

    def wait_for_the_survivors(self) -> None:
        self.cluster.wait_for(lambda: len(self._triggers()) == 1, seconds=PATIENCE)
        self.say(f"The other triggerer has taken all triggers over: {self._triggers()[0]}.")
        self.cluster.wait_for(self._the_killed_have_started_again, seconds=PATIENCE)
        self.say("The tasks of the killed worker have started again on the other one.")

    def _the_killed_have_started_again(self) -> bool:
        tries = dict(
            self.cluster.query(
                "SELECT task_id, try_number FROM task_instance WHERE state NOT IN ('scheduled', 'queued')"
            )
        )
        return all(tries.get(task_id, 0) > try_number for task_id, try_number in self.killed.items())

    def restart_the_scheduler(self) -> None:
        self.cluster.stop("scheduler")
        self._end_some()
        self.cluster.start("scheduler")
        self.say("The scheduler was stopped and started again.")

    def stop_dify_for_20_seconds(self) -> None:
        with self.dify.refusing_connections():
            self.say("Dify is stopped.")
            self._end_some()
            time.sleep(20)
        self.say("Dify is back.")

    def rotate_the_key(self) -> None:
        self.dify.api_keys.add(SECOND_KEY)
        self.cluster.ask_api(
            "PATCH",
            f"/connections/{CONN_ID}?update_mask=password",
            {"connection_id": CONN_ID, "conn_type": "dify", "password": SECOND_KEY},
        )
        self.dify.api_keys.remove(FIRST_KEY)
        self.say("The API key was rotated: changed in Airflow's connection, then the old one refused.")
        self._end_some()
        time.sleep(15)

    def end_all_runs(self) -> None:
        self.say(f"The {len(self.to_end)} runs that are left end.")
        self._end(self.to_end)
        try:
            self.cluster.wait_for(self._is_over, seconds=PATIENCE)
        except AssertionError:
            self._say_what_is_left()
            raise

    def _is_over(self) -> bool:
        # The retries of an operator whose run has failed start a run each, which ends as the first one.
        for run in _started(self.dify):
            if not self.dify.runs[run.workflow_run_id].finished:
                self._end_run(ALL[run.inputs["task_id"]], run.workflow_run_id)
        return self.cluster.is_over(DAG_ID)

    def _say_what_is_left(self) -> None:
        starts = Counter(run.inputs["task_id"] for run in _started(self.dify))
        for task_id, state, tries in self.cluster.query(
            "SELECT task_id, state, try_number FROM task_instance WHERE state NOT IN ('success', 'failed')"
        ):
            self.say(f"{task_id} is still {state} in try {tries}; it has started {starts[task_id]} runs. Its logs:")
            for path in sorted(self.cluster.home.rglob(f"task_id={task_id}/*")):
                self.say(f"{path.name}: {path.read_text(errors='replace')[-3000:]}")

    def _end_some(self) -> None:
        self._end(self.to_end[::13])

    def _end(self, chosen: list[Wait]) -> None:
        self.to_end = [wait for wait in self.to_end if wait not in chosen]
        started = {run.inputs["task_id"]: run.workflow_run_id for run in _started(self.dify)}
        for wait in chosen:
            self._end_run(wait, started.get(wait.task_id) or workflow_run_id(wait.task_id))

    def _end_run(self, wait: Wait, run_id: str) -> None:
        outputs = {"outputs": wait.outputs} if STATE_OF_TASK[wait.ending] == "success" else {}
        self.dify.add_run(wait.ending, run_id=run_id, **outputs)


def _started(dify: DifyStandIn) -> list[Started]:
    """Return the runs that the operators have started; those of the other tests here have other inputs."""
    return [run for run in dify.started if "task_id" in run.inputs]


def test_every_wait_ends_as_its_run_ended(ended: Ended) -> None:
    states = {task_id: ended.states.get(task_id) for task_id in ALL}
    assert states == {task_id: STATE_OF_TASK[wait.ending] for task_id, wait in ALL.items()}


def test_no_task_is_lost(ended: Ended) -> None:
    assert ended.states.keys() == {*ALL, *(f"digest-{way}" for way in {**SENSORS, **OPERATORS})}
    assert set(ended.states.values()) == {"success", "failed"}


def test_no_run_is_started_twice_but_by_a_retry_after_one_that_failed(ended: Ended) -> None:
    starts = Counter(run.inputs["task_id"] for run in _started(ended.dify))
    tries = {"failed": 1 + RETRIES}
    assert starts == {wait.task_id: tries.get(wait.ending, 1) for wait in waits(OPERATORS)}


def test_no_run_is_asked_to_stop(ended: Ended) -> None:
    assert ended.dify.stopped == []


def test_the_outputs_are_byte_for_byte_what_the_server_sent(ended: Ended) -> None:
    different = []
    for task_id, wait in ALL.items():
        if STATE_OF_TASK[wait.ending] == "success":
            run = ended.dify.runs[ended.xcoms[task_id, "workflow_run"]["id"]]
            given = json.loads(run.responses[-1]["outputs"])
            if _as_bytes(ended.xcoms[task_id, "return_value"]) != _as_bytes(given):
                different.append(task_id)
    assert not different


def test_the_next_task_gets_a_megabyte_as_the_server_sent_it(ended: Ended) -> None:
    for way in {**SENSORS, **OPERATORS}:
        outputs = _as_bytes(ALL[f"{way}-0"].outputs)
        assert len(outputs) > 1_000_000
        assert ended.xcoms[f"digest-{way}", "return_value"] == hashlib.sha256(outputs).hexdigest()


def test_every_task_pushes_how_its_run_ended(ended: Ended) -> None:
    for task_id, wait in ALL.items():
        assert ended.xcoms[task_id, "workflow_run"]["status"] == wait.ending


def test_no_key_is_written_down(ended: Ended) -> None:
    written = list(ended.cluster.everything_written())
    assert len(written) > len(ALL)
    for path, content in written:
        for key in (FIRST_KEY, SECOND_KEY):
            assert key.encode() not in content, path


def _as_bytes(value: object) -> bytes:
    # Sorted, because PostgreSQL's JSONB keeps no order of keys.
    return json.dumps(value, ensure_ascii=False, sort_keys=True).encode()
