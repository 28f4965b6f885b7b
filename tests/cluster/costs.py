"""What something took of workers, processor, database and Dify: the difference between two moments."""

from __future__ import annotations

import contextlib
import time
from dataclasses import astuple, dataclass

import psutil
from airflow_cluster import AirflowCluster  # noqa: TC002

from tests.dify_stand_in import DifyStandIn

# PostgreSQL's sessions tell what they wrote at the latest when they have been idle for ten seconds.
STATISTICS_SECONDS = 11


@dataclass(frozen=True)
class Cost:
    """What was used: until a moment, or between two."""

    at: float
    worker_starts: int
    worker_seconds: float
    cpu_seconds: float
    rows_written: int
    rows_kept: int
    requests: int

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(*(now - then for now, then in zip(astuple(self), astuple(earlier), strict=True)))


def cost_until_now(dify: DifyStandIn, cluster: AirflowCluster) -> Cost:
    """Return what everything has taken so far; waits until the database tells it."""
    cpu_seconds = _cpu_seconds()
    time.sleep(STATISTICS_SECONDS)
    seconds = cluster.tasks_run_on_workers()
    # What the scheduler and the other processes write all the time, whatever the tasks do, stands in these tables.
    ((written, kept),) = cluster.query(
        "SELECT sum(n_tup_ins + n_tup_upd + n_tup_del), sum(n_tup_ins - n_tup_del) FROM pg_stat_user_tables"
        " WHERE relname NOT IN ('job', 'dag', 'dag_run')"
    )
    return Cost(time.monotonic(), len(seconds), sum(seconds), cpu_seconds, int(written), int(kept), len(dify.requests))


def _cpu_seconds() -> float:
    """Return the processor time of Airflow, PostgreSQL and Redis, with the processes of theirs that have ended."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total
