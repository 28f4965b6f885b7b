"""Airflow as its users run it: scheduler, Dag processor, API server and triggerer as processes of their own."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import requests

from tests.airflow.empty_airflow import copy_migrated_airflow

AIRFLOW_2 = version("apache-airflow").startswith("2.")
AIRFLOW_3_0 = version("apache-airflow").startswith("3.0.")
AIRFLOW_3_4 = tuple(int(part) for part in version("apache-airflow").split(".")[:2]) >= (3, 4)
# Airflow 3.4 keeps earlier tries as rows of their own, and its XComs name no more than their task instance.
AS_BEFORE_3_4 = """
CREATE TEMP VIEW task_instance AS
    SELECT *, region_index AS map_index FROM main.task_instance WHERE working_set;
CREATE TEMP VIEW xcom AS
    SELECT dag_id, task_id, run_id, region_index AS map_index, key, value
    FROM main.xcom_v2 JOIN main.task_instance ti ON ti.id = task_instance_id WHERE working_set;
"""


def free_port() -> int:
    """Return a port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class AirflowProcesses:
    """
    A whole Airflow in a temporary folder, with SQLite: enough for a few dozen tasks.

    :param home: the folder.
    :param environment: further settings, such as connections.
    """

    def __init__(self, home: Path, environment: dict[str, str]) -> None:
        self.home = home
        self.dags = home / "dags"
        self.dags.mkdir()
        api = free_port()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW_")},
            # Airflow 2 starts its tasks by the command's name.
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__CORE__DAGS_FOLDER": str(self.dags),
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            # Airflow 2 runs nothing side by side on SQLite.
            "AIRFLOW__CORE__EXECUTOR": "SequentialExecutor" if AIRFLOW_2 else "LocalExecutor",
            "AIRFLOW__CORE__PARALLELISM": "4",
            "AIRFLOW__CORE__MAX_ACTIVE_TASKS_PER_DAG": "64",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"http://127.0.0.1:{api}/execution/",
            "AIRFLOW__API__PORT": str(api),
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__API_AUTH__JWT_SECRET": "of-this-test-alone-and-long-enough-for-it",
            "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
            # How soon a new Dag file is seen.
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
            # Who finds the database locked waits longer than five seconds, for a machine under load.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db?timeout=60",
            # So does a task that starts; Airflow's five seconds fail it before it has run.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
            "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
            **environment,
        }
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def commands(self) -> dict[str, list[str]]:
        """The processes that make an Airflow of this version, by name."""
        of_airflow_3 = {} if AIRFLOW_2 else {"api-server": ["api-server"], "dag-processor": ["dag-processor"]}
        # Their log servers would listen on every interface.
        return {
            **of_airflow_3,
            "scheduler": ["scheduler", "--skip-serve-logs"],
            "triggerer": ["triggerer", "--skip-serve-logs"],
        }

    def run(self, *arguments: str) -> str:
        """Run an Airflow command to its end."""
        done = subprocess.run(
            [sys.executable, "-m", "airflow", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    def start(self, name: str) -> None:
        """Start one process, or another command of Airflow's; its output goes to a file of its name."""
        with (self.home / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "airflow", *self.commands.get(name, [name])],
                env=self.environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop one process and what it started."""
        process = self.processes.pop(name)
        # Tasks on a worker are in process groups of their own.
        started = []
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            if how == signal.SIGKILL:
                # So that it starts nothing while it is being looked at.
                os.killpg(process.pid, signal.SIGSTOP)
            started = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            if how != signal.SIGKILL:
                process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        for left in started:
            with contextlib.suppress(psutil.NoSuchProcess):
                left.kill()
        process.kill()
        process.wait(20)

    def query(self, sql: str, *values: Any) -> list[tuple[Any, ...]]:
        """Ask Airflow's database."""
        with contextlib.closing(sqlite3.connect(f"file:{self.home}/airflow.db?mode=ro", uri=True, timeout=30)) as db:
            if AIRFLOW_3_4:
                db.executescript(AS_BEFORE_3_4)
            return db.execute(sql, values).fetchall()

    @property
    def api(self) -> str:
        """The API server's address (Airflow 3)."""
        return f"http://127.0.0.1:{self.environment['AIRFLOW__API__PORT']}"

    def api_answers(self) -> bool:
        """Return whether the API server is up (Airflow 3)."""
        try:
            return requests.get(f"{self.api}/api/v2/version", timeout=30).ok
        except requests.RequestException:
            return False

    def mark_failed(self, dag_id: str, task_id: str) -> None:
        """Mark a task as failed, as a user does in the UI (Airflow 3)."""
        ((run_id,),) = self.query("SELECT run_id FROM dag_run WHERE dag_id = ?", dag_id)
        self.ask_api(
            "PATCH", f"/dags/{dag_id}/dagRuns/{quote(run_id)}/taskInstances/{task_id}", {"new_state": "failed"}
        )

    def ask_api(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Send a request to Airflow's API, as the UI does (Airflow 3)."""
        # Airflow's API server was once seen to take more than 30 seconds, on a busy machine.
        token = requests.get(f"{self.api}/auth/token", timeout=120).json()["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        response = requests.request(method, f"{self.api}/api/v2{path}", json=body, headers=headers, timeout=120)
        response.raise_for_status()

    def wait_for(self, met: Callable[[], bool], seconds: float) -> None:
        """Wait until something is so; fails with what the processes said if it never is."""
        until = time.monotonic() + seconds
        while not met():
            dead = {name: process.poll() for name, process in self.processes.items() if process.poll() is not None}
            if dead or time.monotonic() > until:
                said = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.home.glob("*.out")
                )
                raise AssertionError(f"It did not come to be in {seconds} s; ended processes: {dead}\n{said}")
            time.sleep(0.5)

    def everything_written(self) -> Iterator[tuple[Path, bytes]]:
        """Return every file that this Airflow wrote, logs and database included."""
        for path in self.home.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()

    def make_database(self) -> None:
        """Make the database, with all tables."""
        copy_migrated_airflow(self.home)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Make the database, start all processes, and stop them in the end."""
        self.make_database()
        try:
            for name in self.commands:
                self.start(name)
            if "api-server" in self.processes:
                # Airflow 3.0 fails a task that starts before it can reach the API server.
                self.wait_for(self.api_answers, seconds=120)
            yield
        finally:
            for name in reversed(list(self.processes)):
                # Nobody needs what they would tidy up.
                self.stop(name, signal.SIGKILL)


@contextlib.contextmanager
def airflow_processes(environment: dict[str, str]) -> Iterator[AirflowProcesses]:
    """Run an Airflow in a temporary folder of its own."""
    with tempfile.TemporaryDirectory(prefix="airflow-processes-", ignore_cleanup_errors=True) as home:
        airflow = AirflowProcesses(Path(home), environment)
        with airflow.running():
            yield airflow
