"""Airflow beyond one machine: PostgreSQL, Celery on Redis, two workers and two triggerers."""

from __future__ import annotations

import base64
import contextlib
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import requests
from servers import binary, postgresql, redis

from tests.airflow.airflow_processes import AirflowProcesses

HERE = Path(__file__).parent
WORKERS = ("worker-1", "worker-2")
TRIGGERERS = ("triggerer-1", "triggerer-2")
TASKS_OF_A_WORKER = 16
# What Celery's worker says when a task's process has ended.
TASK_ENDED = re.compile(r"execute_workload\[[0-9a-f-]+\] (?:succeeded|raised|retry).*?([0-9.]+)s(?::|$)", re.MULTILINE)


class AirflowCluster(AirflowProcesses):
    """
    A whole Airflow cluster; its settings are Airflow's own, but for what makes it notice the dead sooner.

    :param home: a folder for its logs.
    :param database: PostgreSQL's address.
    :param broker: Redis' URL.
    """

    def __init__(self, home: Path, database: str, broker: str) -> None:
        self.database = database
        super().__init__(
            home,
            {
                "PYTHONPATH": str(HERE),
                "AIRFLOW__CORE__DAGS_FOLDER": str(HERE / "dags"),
                "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
                "AIRFLOW__CORE__PARALLELISM": str(TASKS_OF_A_WORKER * len(WORKERS)),
                "AIRFLOW__CORE__FERNET_KEY": base64.urlsafe_b64encode(os.urandom(32)).decode(),
                "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{database}",
                "AIRFLOW__CELERY__BROKER_URL": broker,
                # 300 and 600 seconds by default.
                "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "40",
                "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "90",
                "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "15",
                # No proxy of the machine stands between the cluster and its servers.
                "NO_PROXY": "127.0.0.1,localhost",
                "no_proxy": "127.0.0.1,localhost",
            },
            quick=False,
        )

    def make_database(self) -> None:
        """Make the tables in PostgreSQL."""
        self.run("db", "migrate")

    @property
    def commands(self) -> dict[str, list[str]]:
        """The processes of the cluster."""
        commands = super().commands
        triggerer = commands.pop("triggerer")
        worker = ["celery", "worker", "--skip-serve-logs", "--concurrency", str(TASKS_OF_A_WORKER)]
        return {
            **commands,
            **dict.fromkeys(TRIGGERERS, triggerer),
            **{name: [*worker, "--celery-hostname", name, "--pid", str(self.home / f"{name}.pid")] for name in WORKERS},
        }

    def is_up(self) -> bool:
        """Return whether api-server, scheduler, both triggerers and both workers are at work."""
        try:
            self.ask_api("GET", "/version")
        except requests.ConnectionError:
            return False
        jobs = self.query(
            "SELECT job_type, count(*) FROM job WHERE latest_heartbeat > now() - interval '20 seconds'"
            " AND state = 'running' GROUP BY job_type"
        )
        said = [(self.home / f"{name}.out").read_text() for name in WORKERS]
        # A worker that was killed and started again is ready for the second time.
        workers_are_ready = all(0 < text.count("[config]") == text.count(" ready.") for text in said)
        return workers_are_ready and {("SchedulerJob", 1), ("TriggererJob", len(TRIGGERERS))} <= set(jobs)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask Airflow's database."""
        with contextlib.closing(psycopg2.connect(f"postgresql://{self.database}")) as db, db.cursor() as cursor:
            cursor.execute(sql, values)
            return cursor.fetchall()

    def process_of(self, pid: int) -> str:
        """Name the process that started this one."""
        parents = {parent.pid for parent in psutil.Process(pid).parents()}
        return next(name for name, process in self.processes.items() if process.pid in parents)

    def unpause(self, dag_id: str) -> None:
        """Let a Dag run, once it is known."""
        self.wait_for(lambda: bool(self.query("SELECT 1 FROM dag WHERE dag_id = %s", dag_id)), seconds=60)
        self.ask_api("PATCH", f"/dags/{dag_id}", {"is_paused": False})

    def trigger(self, dag_id: str, **conf: str) -> None:
        """Start a run of a Dag."""
        self.ask_api("POST", f"/dags/{dag_id}/dagRuns", {"logical_date": None, "conf": conf})

    def is_over(self, dag_id: str) -> bool:
        """Return whether all runs of a Dag have ended, however."""
        states = self.query("SELECT DISTINCT state FROM dag_run WHERE dag_id = %s", dag_id)
        return {state for (state,) in states} <= {"success", "failed"}

    def tasks_run_on_workers(self) -> list[float]:
        """Return the seconds that each task took of a worker, from their logs; a task is run once a start."""
        said = "".join((self.home / f"{name}.out").read_text() for name in WORKERS)
        return [float(seconds) for seconds in TASK_ENDED.findall(said)]

    def everything_written(self) -> Iterator[tuple[Path, bytes]]:
        """Return every file that the cluster wrote, and its database as text."""
        yield from super().everything_written()
        dump = [binary("pg_dump"), f"postgresql://{self.database}"]
        yield Path("database"), subprocess.run(dump, check=True, capture_output=True).stdout


@contextlib.contextmanager
def airflow_cluster() -> Iterator[AirflowCluster]:
    """Start everything, and stop it in the end."""
    with (
        tempfile.TemporaryDirectory(prefix="airflow-cluster-", ignore_cleanup_errors=True) as home,
        postgresql() as database,
        redis(Path(home)) as broker,
    ):
        cluster = AirflowCluster(Path(home), database, broker)
        try:
            cluster.start_all()
            cluster.wait_for(cluster.is_up, seconds=120)
            yield cluster
        finally:
            cluster.stop_all()
