"""One Airflow of real processes for all test processes: each Dag has a stand-in for Dify and a connection to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil

from tests.airflow.airflow_processes import AIRFLOW_2, AirflowProcesses, signal_group, task_logs
from tests.airflow.empty_airflow import SESSION, locked
from tests.dify_stand_in import DifyStandIn

if TYPE_CHECKING:
    import pytest

KEY = "app-zQ9-the-key-of-these-tests"
# How many Dags there may be in one test session.
CONNECTIONS = 32

SETTINGS = {
    "AIRFLOW__CORE__PARALLELISM": "6",
    # How soon a new Dag file is seen on Airflow 2.
    "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "2",
    "AIRFLOW__LOGGING__JSON_LOGS": "True",
    # How soon another triggerer takes over, and a task whose process was killed is retried.
    "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
    "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "4",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
    "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
}

T = TypeVar("T")


@dataclass
class Scenario:
    """A Dag on the shared Airflow, and the Dify that it talks to."""

    airflow: AirflowProcesses
    dify: DifyStandIn
    dag_id: str
    conn_id: str

    def add_dag(self, code: str, **values: object) -> None:
        """Write the Dag file; ``code`` is formatted with ``dag_id``, ``conn_id`` and these values."""
        code = code.format(dag_id=self.dag_id, conn_id=self.conn_id, **values)
        path = self.airflow.dags / f"{self.dag_id}.py"
        # Airflow never reads half of a file.
        unseen = path.with_suffix(".writing")
        unseen.write_text(code, encoding="utf-8")
        unseen.rename(path)

    def remove_dag(self) -> None:
        """Remove the Dag file, so that Airflow does not go on parsing it."""
        (self.airflow.dags / f"{self.dag_id}.py").unlink(missing_ok=True)

    def query(self, columns: str, table: str, condition: str = "1", *values: Any) -> list[tuple[Any, ...]]:
        """Ask Airflow's database for the Dag's rows of a table."""
        return self.airflow.query(
            f"SELECT {columns} FROM {table} WHERE dag_id = ? AND {condition}", self.dag_id, *values
        )

    def pid(self) -> int | None:
        """Return the process of the first try of the task ``run``, while it runs."""
        condition = "task_id = 'run' AND state = 'running' AND try_number = 1 AND pid > 0"
        rows = self.query("pid", "task_instance", condition)
        return int(rows[0][0]) if rows else None

    def kill(self, how: signal.Signals) -> None:
        """Send a signal to the process of the first try of the task ``run``, once it runs."""
        self.wait_for(self.pid, seconds=60)
        pid = self.pid()
        assert pid is not None
        os.kill(pid, how)

    def wait_for(self, met: Callable[[], object], seconds: float) -> None:
        """Wait until something is so."""
        self.airflow.wait_for(lambda: bool(met()), seconds, self.logs)

    @property
    def logs(self) -> Path:
        """The folder with the logs of the Dag's tasks."""
        return self.airflow.home / "logs" / f"dag_id={self.dag_id}"

    def wait_until_over(self, seconds: float) -> None:
        """Wait until the Dag run has ended."""
        self.wait_for(lambda: self.query("1", "dag_run", "state IN ('success', 'failed')"), seconds)


class SharedAirflow:
    """
    The Airflow of the test session and its connections.

    :param folder: what all processes of the session share.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Keep the ports of the stand-ins from others, without listening there.
        self._holders: list[socket.socket] = []

    def enter(self) -> None:
        """Start the Airflow, or join the process of the session that has."""
        with locked(self.folder):
            home = self.folder / "home"
            if not (self.folder / "state.json").exists():
                home.mkdir(exist_ok=True)
                self.airflow = AirflowProcesses(home, self._environment())
                try:
                    self.airflow.start_all()
                except BaseException:
                    self.airflow.stop_all()
                    raise
                pids = [process.pid for process in self.airflow.processes.values()]
                self._write({"environment": self.airflow.environment, "pids": pids, "users": 0, "scenarios": 0})
            state = self._read()
            self.airflow = getattr(self, "airflow", None) or AirflowProcesses(home, {})
            self.airflow.environment = state["environment"]
            self._write({**state, "users": state["users"] + 1})

    def leave(self) -> None:
        """Stop the Airflow if nobody else uses it."""
        with locked(self.folder):
            state = self._read()
            self._write({**state, "users": state["users"] - 1})
            if state["users"] > 1:
                return
            for pid in state["pids"]:
                for left in signal_group(pid, signal.SIGKILL):
                    with contextlib.suppress(psutil.NoSuchProcess):
                        left.kill()
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.with_suffix(".lock").unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        return state

    def _write(self, state: dict[str, Any]) -> None:
        (self.folder / "state.json").write_text(json.dumps(state), encoding="utf-8")

    def _environment(self) -> dict[str, str]:
        environment = dict(SETTINGS)
        for number in range(CONNECTIONS):
            holder = socket.socket()
            holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            holder.bind(("127.0.0.1", 0))
            self._holders.append(holder)
            fields = {"conn_type": "dify", "host": f"http://127.0.0.1:{holder.getsockname()[1]}/v1", "password": KEY}
            environment[f"AIRFLOW_CONN_DIFY_{number}"] = json.dumps(fields)
        return environment

    @contextlib.contextmanager
    def scenario(self, dag_id: str, dialect: str = "1.12.1") -> Iterator[Scenario]:
        """
        Start a stand-in that only one Dag has a connection to.

        :param dag_id: the Dag's id, unlike all others of the session.
        :param dialect: the version that the stand-in speaks like.
        """
        with locked(self.folder):
            state = self._read()
            number = state["scenarios"]
            self._write({**state, "scenarios": number + 1})
        fields = json.loads(self.airflow.environment[f"AIRFLOW_CONN_DIFY_{number}"])
        with DifyStandIn(dialect, port=int(fields["host"].split(":")[2].partition("/")[0])) as dify:
            dify.api_keys = {KEY}
            scenario = Scenario(self.airflow, dify, dag_id, f"dify_{number}")
            task_logs.append(scenario.logs)
            try:
                yield scenario
            finally:
                scenario.remove_dag()


def chosen_params(request: pytest.FixtureRequest, name: str) -> set[str]:
    """Return the values of a parameter in those tests of the fixture's module that will run."""
    items = (item for item in request.session.items if item.path == request.path)
    return {item.callspec.params[name] for item in items if hasattr(item, "callspec") and name in item.callspec.params}


def side_by_side(scenarios: Mapping[str, Callable[[], T]]) -> dict[str, Future[T]]:
    """Run scenarios at the same time, to their ends; each one's ``result()`` returns or raises what it did."""
    with ThreadPoolExecutor(max_workers=max(1, len(scenarios))) as pool:
        return {name: pool.submit(scenario) for name, scenario in scenarios.items()}


@contextlib.contextmanager
def shared_airflow() -> Iterator[SharedAirflow]:
    """Use the Airflow."""
    # Airflow 2 runs one task at a time on SQLite, so that each process of the session needs its own.
    name = f"airflow-shared-{SESSION}-{os.getpid() if AIRFLOW_2 else ''}"
    airflow = SharedAirflow(Path(tempfile.gettempdir()) / name)
    airflow.enter()
    try:
        yield airflow
    finally:
        airflow.leave()
