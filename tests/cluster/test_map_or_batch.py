"""The same rows as mapped tasks and as a batch, one after the other: how fast they are, and what a row costs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from airflow_cluster import TASKS_OF_A_WORKER, TRIGGERERS, WORKERS, AirflowCluster
from conftest import Say  # noqa: TC002
from costs import Cost, cost_until_now
from rows import ACTIVE, BATCH, MAPPED, ROWS

from tests.dify_stand_in import DifyStandIn

RUN_SECONDS = 0.5
NAMES = {MAPPED: "`.expand()` with `DifyRunWorkflowOperator`", BATCH: "`DifyRunWorkflowBatchOperator`"}


@dataclass(frozen=True)
class Measured:
    """What a Dag run of all rows took, from its start to its end."""

    seconds: float
    cost: Cost
    starts: int

    @property
    def rows_a_minute(self) -> float:
        return len(ROWS) / self.seconds * 60


@pytest.fixture(scope="module")
def measured(
    say: Say, dify: DifyStandIn, cluster: AirflowCluster, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Measured]]:
    """What both ways took; printed as a table."""
    assert TASKS_OF_A_WORKER * len(WORKERS) == ACTIVE
    for name in (*WORKERS, *TRIGGERERS):
        if name not in cluster.processes:
            cluster.start(name)
    cluster.wait_for(cluster.is_up, seconds=120)
    output = tmp_path_factory.mktemp("batch") / "results.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dify, "run_duration", RUN_SECONDS)
        found = {}
        for dag_id in (MAPPED, BATCH):
            cluster.unpause(dag_id)
            before, started = cost_until_now(dify, cluster), len(dify.started)
            cluster.trigger(dag_id, output_path=str(output))
            cluster.wait_for(lambda dag_id=dag_id: cluster.is_over(dag_id), seconds=900)  # type: ignore[misc]
            cost = cost_until_now(dify, cluster) - before
            ((seconds,),) = cluster.query(
                "SELECT extract(epoch FROM end_date - start_date) FROM dag_run WHERE dag_id = %s", dag_id
            )
            found[dag_id] = Measured(float(seconds), cost, len(dify.started) - started)
            say(f"{len(ROWS)} rows are over: {NAMES[dag_id]}.")
        _print_table(found)
        results = [json.loads(line) for line in Path(output).read_text().splitlines()]
        assert [row["status"] for row in results] == ["succeeded"] * len(ROWS)
        yield found


def _print_table(found: dict[str, Measured]) -> None:
    print(
        f"\n{len(ROWS)} rows, runs of {RUN_SECONDS} s, at most {ACTIVE} at once:\n\n"
        "| | wall time | rows a minute | worker starts | CPU per row | database rows written per row | of them left |"
        " requests to Dify per row |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for dag_id, way in found.items():
        cost, rows = way.cost, len(ROWS)
        print(
            f"| {NAMES[dag_id]} | {way.seconds:.1f} s | {way.rows_a_minute:,.0f} | {cost.worker_starts} |"
            f" {cost.cpu_seconds / rows:.3f} s | {cost.rows_written / rows:.2f} | {cost.rows_kept / rows:.2f} |"
            f" {cost.requests / rows:.2f} |"
        )
    print(f"\n{found[BATCH].rows_a_minute / found[MAPPED].rows_a_minute:.1f} times the rows a minute.\n", flush=True)


def test_each_row_has_one_run_either_way(measured: dict[str, Measured]) -> None:
    assert {dag_id: way.starts for dag_id, way in measured.items()} == dict.fromkeys((MAPPED, BATCH), len(ROWS))


def test_a_batch_takes_one_worker_start_and_mapped_tasks_one_for_each_row(measured: dict[str, Measured]) -> None:
    assert measured[MAPPED].cost.worker_starts >= len(ROWS)
    assert measured[BATCH].cost.worker_starts == 1


def test_a_batch_runs_at_least_twenty_times_the_rows_a_minute(measured: dict[str, Measured]) -> None:
    assert measured[BATCH].rows_a_minute >= 20 * measured[MAPPED].rows_a_minute
