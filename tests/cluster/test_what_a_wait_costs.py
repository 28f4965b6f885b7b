"""The same waits in every way, one way after the other: what each takes of workers, database and Dify."""

from __future__ import annotations

import time

import pytest
from airflow_cluster import TRIGGERERS, WORKERS, AirflowCluster
from conftest import Say  # noqa: TC002
from costs import Cost, cost_until_now
from waits import COUNTED, COUNTED_INTERVAL, workflow_run_id

from tests.dify_stand_in import DifyStandIn

WAITS = 10
RUN_SECONDS = 30
# So that the starts don't take the two cores from each other.
SECONDS_BETWEEN = 1.5

NAMES = {
    "poke": "poke",
    "reschedule": "reschedule",
    "deferrable": "deferrable",
    "ended_by_triggerer": "ended by the triggerer",
    "all_on_triggerer": "all on the triggerer",
}


@pytest.fixture(scope="module")
def costs(say: Say, dify: DifyStandIn, cluster: AirflowCluster) -> dict[str, Cost]:
    """What each way cost; printed as a table."""
    for name in (*WORKERS, *TRIGGERERS):
        if name not in cluster.processes:
            cluster.start(name)
    cluster.wait_for(cluster.is_up, seconds=120)
    costs, before = {}, cost_until_now(dify, cluster)
    for way in COUNTED:
        _wait(way, dify, cluster)
        now = cost_until_now(dify, cluster)
        costs[way], before = now - before, now
        say(f"{WAITS} waits counted: {NAMES[way]}.")
    _print_table(costs)
    return costs


def _wait(way: str, dify: DifyStandIn, cluster: AirflowCluster) -> None:
    cluster.unpause(f"counted_{way}")
    for number in range(WAITS):
        run_id = workflow_run_id(f"counted_{way}-{number}")
        dify.add_run("running", "succeeded", run_id=run_id, duration=RUN_SECONDS, outputs={"answer": "42"})
        cluster.trigger(f"counted_{way}", workflow_run_id=run_id)
        time.sleep(SECONDS_BETWEEN)
    cluster.wait_for(lambda: cluster.is_over(f"counted_{way}"), seconds=240)


def _print_table(costs: dict[str, Cost]) -> None:
    print(
        f"\n{WAITS} waits for runs of {RUN_SECONDS} s, looked at every {COUNTED_INTERVAL} s; each number is for"
        " one wait:\n\n"
        "| way | worker starts | seconds of a worker | database rows written | of them left | requests to Dify |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for way, cost in costs.items():
        numbers = (cost.worker_starts, cost.worker_seconds, cost.rows_written, cost.rows_kept, cost.requests)
        print(f"| {NAMES[way]} | {' | '.join(f'{number / WAITS:.1f}' for number in numbers)} |")
    print(flush=True)


def test_each_way_takes_the_worker_starts_that_the_readme_says(costs: dict[str, Cost]) -> None:
    starts = {way: cost.worker_starts / WAITS for way, cost in costs.items()}
    # One a poll, and polls are late when the cluster is busy.
    assert starts.pop("reschedule") > 2
    assert starts == {"poke": 1, "deferrable": 2, "ended_by_triggerer": 1, "all_on_triggerer": 0}


def test_only_the_poking_wait_holds_a_worker_all_the_time(costs: dict[str, Cost]) -> None:
    held = {way for way, cost in costs.items() if cost.worker_seconds / WAITS >= RUN_SECONDS}
    assert held == {"poke"}
