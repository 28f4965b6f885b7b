"""
A soak: two hundred starts on two workers, behind a proxy that fails at random, while their processes get signals.

All of it happens once, in the fixture ``ledger``; each test then looks at what became of it.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from airflow_cluster import TRIGGERERS, WORKERS, AirflowCluster
from conftest import Say  # noqa: TC002
from flaky_proxy import FlakyProxy
from soak_ledger import UNCERTAIN, Ledger
from soak_tasks import CONN_ID, DAG_ID, STARTS, inputs_of

from tests.dify_stand_in import API_KEY, DifyStandIn, Start, form_field

# How long all of it may take.
PATIENCE = 1500
SHARE_OF_FAULTS = 0.05
SIGNALS = 80
SLOTS = 6
# The processes of running tasks, and whether their run is named.
RUNNING = """
    SELECT pid, EXISTS (SELECT 1 FROM xcom WHERE xcom.task_id = ti.task_id AND xcom.dag_id = ti.dag_id
        AND xcom.run_id = ti.run_id AND key = 'workflow_run_id')
    FROM task_instance ti WHERE dag_id = %s AND state = 'running' AND pid IS NOT NULL ORDER BY task_id
"""


@pytest.fixture(scope="module")
def queueing_dify() -> Iterator[DifyStandIn]:
    """A Dify 1.16.1 whose workers are few."""
    with DifyStandIn("1.16.1") as server:
        server.slots = SLOTS
        server.user_input_form = [form_field(name) for name in inputs_of(0)]
        server.echoes_inputs = True
        server.silence_limit = 20
        server.ping_interval = 1
        yield server


@pytest.fixture(scope="module")
def ledger(say: Say, cluster: AirflowCluster, queueing_dify: DifyStandIn) -> Ledger:
    """Let all tasks start their runs, do to them what chance says, and bring together what became of it."""
    seed = int(os.environ.get("SOAK_SEED") or random.SystemRandom().randrange(2**32))
    say(f"Soak with SOAK_SEED={seed}.")
    chance = random.Random(seed)
    for name in (*WORKERS, *TRIGGERERS):
        if name not in cluster.processes:
            cluster.start(name)
    cluster.wait_for(cluster.is_up, seconds=120)
    queueing_dify.starts.extend(_start(chance) for _ in range(4 * STARTS))
    with FlakyProxy(queueing_dify.port, seed, SHARE_OF_FAULTS) as proxy:
        connection = {
            "connection_id": CONN_ID,
            "conn_type": "dify",
            "host": f"http://127.0.0.1:{proxy.port}/v1",
            "password": API_KEY,
            "extra": '{"timeout": 10}',
        }
        cluster.ask_api("POST", "/connections", connection)
        cluster.unpause(DAG_ID)
        cluster.trigger(DAG_ID)
        say(f"{STARTS} tasks start a run each; {SLOTS} runs run at once.")
        signals = _send_signals(say, cluster, chance)
        faults = Counter(proxy.faults)
    say("All tasks have ended.")
    cluster.wait_for(lambda: all(run.finished for run in list(queueing_dify.accepted)), seconds=PATIENCE)
    say("All runs have ended.")
    ledger = Ledger(cluster, queueing_dify)
    ledger.print_table(faults, signals)
    return ledger


def _start(chance: random.Random) -> Start:
    duration = chance.uniform(1.0, 5.0)
    if chance.random() < 0.1:
        return Start("run_streaming_failed", duration=duration)
    return Start(duration=duration)


def _send_signals(say: Say, cluster: AirflowCluster, chance: random.Random) -> Counter[str]:
    """Send signals to running tasks until all have ended; return how many of each."""
    sent: Counter[str] = Counter()
    until = time.monotonic() + PATIENCE
    while not cluster.is_over(DAG_ID):
        assert time.monotonic() < until, _not_over(cluster)
        time.sleep(chance.uniform(1.0, 4.0))
        running = cluster.query(RUNNING, DAG_ID)
        # Most of a task's life is its start and its end: half of the signals are for those that wait for their run.
        waiting = [pid for pid, is_waiting in running if is_waiting]
        chosen = waiting if waiting and chance.random() < 0.5 else [pid for pid, _ in running]
        if not chosen or sent.total() >= SIGNALS:
            continue
        pid = chance.choice(chosen)
        which = chance.choice((signal.SIGTERM, signal.SIGKILL))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, which)
            sent[which.name] += 1
    say(f"{sent.total()} signals were sent to tasks.")
    return sent


def _not_over(cluster: AirflowCluster) -> str:
    states = cluster.query("SELECT task_id, state, try_number FROM task_instance WHERE dag_id = %s", DAG_ID)
    return f"Not over: {[row for row in states if row[1] not in ('success', 'failed')]}"


def test_every_task_ends(ledger: Ledger) -> None:
    assert ledger.states.keys() <= {"success", "failed"}
    assert ledger.states.total() == STARTS


def test_a_task_that_succeeds_returns_the_outputs_of_its_own_run(ledger: Ledger) -> None:
    succeeded = {number: task for number, task in ledger.tasks.items() if task.state == "success"}
    assert succeeded
    assert {number: task.outputs for number, task in succeeded.items()} == {n: inputs_of(n) for n in succeeded}
    assert all(ledger.runs[str(task.run_id)].number == number for number, task in succeeded.items())


def test_no_task_speaks_of_a_run_of_another_task(ledger: Ledger) -> None:
    owners = {
        (number, run_id): ledger.runs[run_id].number
        for number, task in ledger.tasks.items()
        for run_id in task.named_runs & ledger.runs.keys()
    }
    assert {key: owner for key, owner in owners.items() if owner != key[0]} == {}


def test_no_run_is_started_while_another_of_its_task_can_be_used(ledger: Ledger) -> None:
    assert ledger.started_while_another_could_be_used() == []


def test_no_run_is_lost(ledger: Ledger) -> None:
    assert [run for run in ledger.runs.values() if ledger.what_became_of(run) == "lost"] == []


def test_every_start_that_fails_as_uncertain_names_its_user(ledger: Ledger) -> None:
    for number, task in ledger.tasks.items():
        if task.reason == UNCERTAIN:
            error = next(line for line in reversed(task.logs[task.tries]) if line.get("error_detail"))
            text = error["error_detail"][0]["exc_value"]
            assert "'soak'" in text or f"/start-{number}/" in text


def test_every_stop_is_one_of_the_task_whose_run_it_stops(ledger: Ledger) -> None:
    stopped = {run.id for run in ledger.runs.values() if run.was_asked_to_stop}
    said = {run_id for task in ledger.tasks.values() for run_id in task.runs_asked_to_stop}
    known_tasks = {started.task_id for started in ledger.dify.started}
    assert {task_id for task_id, _ in ledger.dify.stopped} <= known_tasks
    # A task that is killed while it stops its run can't say so any more.
    assert stopped - said <= {run.id for run in ledger.runs.values() if run.id in ledger.tasks[run.number].named_runs}


def test_runs_and_tasks_add_up(ledger: Ledger) -> None:
    became = Counter(ledger.what_became_of(run) for run in ledger.runs.values())
    assert became["gave its task's result"] == ledger.states["success"]
    assert became.total() == len(ledger.dify.started) == len(ledger.dify.accepted)
