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
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import psutil
import requests
from requests.adapters import HTTPAdapter
from urllib3.util.retry import Retry

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

# ``python -m airflow``, with deferred tasks that may resume soon: see min_heartbeat_interval below.
QUICKLY = """
from airflow.__main__ import main
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger

DifyWorkflowRunTrigger.resume_delay = 3.0
main()
"""
QUICK_SETTINGS = {
    # How late Airflow sees the end of a worker's process.
    "AIRFLOW__WORKERS__MIN_HEARTBEAT_INTERVAL": "1",
    "AIRFLOW__SCHEDULER__SCHEDULER_IDLE_SLEEP_TIME": "0.5",
}

#: The folders of task logs that a failure of one of the module's tests shows.
task_logs: list[Path] = []


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
    :param quick: whether Airflow and the package may wait less than they do by default.
    """

    def __init__(self, home: Path, environment: dict[str, str], *, quick: bool = True) -> None:
        self.home = home
        self.quick = quick
        self.dags = home / "dags"
        self.dags.mkdir(exist_ok=True)
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
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "1",
            "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "1",
            # Who finds the database locked waits longer than five seconds, for a machine under load.
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/airflow.db?timeout=60",
            # So does a task that starts; Airflow's five seconds fail it before it has run.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
            "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
            **(QUICK_SETTINGS if quick else {}),
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

    def main(self, name: str) -> list[str]:
        """Return Python's arguments that make it Airflow."""
        return ["-c", QUICKLY] if self.quick and name == "triggerer" else ["-m", "airflow"]

    def start(self, name: str) -> None:
        """Start one process, or another command of Airflow's; its output goes to a file of its name."""
        environment = dict(self.environment)
        if name == "api-server":
            # Its event loop itself writes for a request of the UI. If a thread writes then, the loop waits for a commit
            # that waits for the loop: every request hangs up to this timeout, and that one gets a 500.
            connection = "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN"
            environment[connection] = environment[connection].replace("timeout=60", "timeout=3")
        with (self.home / f"{name}.out").open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *self.main(name), *self.commands.get(name, [name])],
                env=environment,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop one process and what it started."""
        process = self.processes.pop(name)
        started = signal_group(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            if how != signal.SIGKILL:
                process.wait(20)
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

    def ask_api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Send a request to Airflow's API, as the UI does, and return its response (Airflow 3)."""
        # Again where the API server finds its database locked: see start.
        adapter = HTTPAdapter(max_retries=Retry(8, status_forcelist=[500], allowed_methods=None, backoff_factor=1))
        with requests.Session() as session:
            session.mount("http://", adapter)
            token = session.get(f"{self.api}/auth/token", timeout=120).json()["access_token"]
            headers = {"Authorization": f"Bearer {token}"}
            response = session.request(method, f"{self.api}/api/v2{path}", json=body, headers=headers, timeout=120)
            response.raise_for_status()
            return response.json() if response.content else None

    def wait_for(self, met: Callable[[], bool], seconds: float, logs: Path | None = None) -> None:
        """Wait until something is so; fails with what the processes and the tasks said if it never is."""
        until = time.monotonic() + seconds
        while not met():
            dead = {name: process.poll() for name, process in self.processes.items() if process.poll() is not None}
            if dead or time.monotonic() > until:
                said = "\n".join(
                    f"--- {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in self.home.glob("*.out")
                )
                said += "\n" + ends_of_logs([logs or self.home / "logs"])
                raise AssertionError(f"It did not come to be in {seconds} s; ended processes: {dead}\n{said}")
            time.sleep(0.2)

    def everything_written(self) -> Iterator[tuple[Path, bytes]]:
        """Return every file that this Airflow wrote, logs and database included."""
        for path in self.home.rglob("*"):
            if path.is_file():
                yield path, path.read_bytes()

    def make_database(self) -> None:
        """Make the database, with all tables."""
        copy_migrated_airflow(self.home)
        with contextlib.closing(sqlite3.connect(self.home / "airflow.db")) as db:
            # Who reads and who writes don't wait for each other. Otherwise two that read and then want to write fail at
            # once, whatever the timeout above is.
            db.execute("PRAGMA journal_mode=WAL")

    def start_all(self) -> None:
        """Make the database and start all processes."""
        self.make_database()
        for name in self.commands:
            self.start(name)
        if "api-server" in self.processes:
            # Airflow 3.0 fails a task that starts before it can reach the API server.
            self.wait_for(self.api_answers, seconds=240)

    def stop_all(self) -> None:
        """Stop all processes; nobody needs what they would tidy up."""
        for name in reversed(list(self.processes)):
            self.stop(name, signal.SIGKILL)


def signal_group(pid: int, how: signal.Signals) -> list[psutil.Process]:
    """Send a signal to a process and its group, and return what it started: tasks are in groups of their own."""
    started = []
    with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
        if how == signal.SIGKILL:
            # So that it starts nothing while it is being looked at.
            os.killpg(pid, signal.SIGSTOP)
        started = psutil.Process(pid).children(recursive=True)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, how)
    return started


def ends_of_logs(folders: Iterable[Path]) -> str:
    """Return what the task logs of some folders end with."""
    paths = sorted(path for folder in folders for path in folder.rglob("*.log") if "task_id=" in str(path))
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')[-3000:]}" for path in paths)


@contextlib.contextmanager
def airflow_processes(environment: dict[str, str], *, quick: bool = True) -> Iterator[AirflowProcesses]:
    """Run an Airflow in a temporary folder of its own."""
    with tempfile.TemporaryDirectory(prefix="airflow-processes-", ignore_cleanup_errors=True) as home:
        airflow = AirflowProcesses(Path(home), environment, quick=quick)
        task_logs.append(airflow.home / "logs")
        try:
            airflow.start_all()
            yield airflow
        finally:
            airflow.stop_all()
