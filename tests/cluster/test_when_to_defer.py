"""What it costs to wait for runs of several lengths with a deferrable operator: one that defers at once, or later."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import pytest
from airflow_cluster import TRIGGERERS, WORKERS, AirflowCluster
from conftest import Say  # noqa: TC002
from deferrals import DEFERRALS, dag_id_of

from tests.dify_stand_in import DifyStandIn

RUNS = 5
# So that the starts don't take the two cores from each other.
SECONDS_BETWEEN = 2.0


@dataclass(frozen=True)
class Measured:
    """What one task took, on average, and the median of the seconds from its run's end to its own."""

    worker_starts: float
    worker_seconds: float
    delay: float


@pytest.fixture(scope="module")
def measured(say: Say, dify: DifyStandIn, cluster: AirflowCluster) -> dict[tuple[int, int], Measured]:
    """What each length of run and each time to defer took; printed as a table."""
    for name in (*WORKERS, *TRIGGERERS):
        if name not in cluster.processes:
            cluster.start(name)
    cluster.wait_for(cluster.is_up, seconds=120)
    found = {}
    for case in DEFERRALS:
        found[case] = _measure(dify, cluster, *case)
        say(f"{RUNS} runs of {case[0]} s are over, with defer_after={case[1]}.")
    print(
        f"\n{RUNS} runs of each length; each number is for one run:\n\n"
        "| run | defer_after | worker starts | seconds of a worker | run's end to task's end |\n"
        "| ---: | ---: | ---: | ---: | ---: |"
    )
    for (run_seconds, defer_after), way in found.items():
        print(
            f"| {run_seconds} s | {defer_after} | {way.worker_starts:.1f} | {way.worker_seconds:.1f} s |"
            f" {way.delay:.1f} s |"
        )
    print(flush=True)
    return found


def _measure(dify: DifyStandIn, cluster: AirflowCluster, run_seconds: int, defer_after: int) -> Measured:
    dag_id = dag_id_of(run_seconds, defer_after)
    cluster.unpause(dag_id)
    before, started = cluster.tasks_run_on_workers(), len(dify.started)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dify, "run_duration", run_seconds)
        for number in range(RUNS):
            cluster.trigger(dag_id, number=str(number))
            time.sleep(SECONDS_BETWEEN)
        cluster.wait_for(lambda: cluster.is_over(dag_id), seconds=300)
    # The workers' logs, which the starts are counted in, come some seconds later.
    time.sleep(10)
    ended = sorted(
        float(at)
        for (at,) in cluster.query("SELECT extract(epoch FROM end_date) FROM task_instance WHERE dag_id = %s", dag_id)
    )
    over = sorted(run.at + run_seconds for run in dify.started[started:])
    seconds = cluster.tasks_run_on_workers()[len(before) :]
    delay = median(task - run for task, run in zip(ended, over, strict=True))
    return Measured(len(seconds) / RUNS, sum(seconds) / RUNS, delay)


def test_a_run_that_is_over_before_its_task_defers_takes_one_worker_start(
    measured: dict[tuple[int, int], Measured],
) -> None:
    assert {case: way.worker_starts for case, way in measured.items()} == {
        case: 1 if case[0] < case[1] else 2 for case in DEFERRALS
    }


def test_a_quick_run_reaches_the_next_task_sooner_where_its_task_does_not_defer(
    measured: dict[tuple[int, int], Measured],
) -> None:
    assert all(measured[seconds, 15].delay < measured[seconds, 0].delay for seconds in (2, 10))
