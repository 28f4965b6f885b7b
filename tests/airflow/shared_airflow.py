"""One Airflow of real processes for many Dags: each has a stand-in for Dify and a connection to it of its own."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.airflow.airflow_processes import AirflowProcesses, airflow_processes
from tests.dify_stand_in import DifyStandIn

KEY = "app-zQ9-the-key-of-these-tests"
# How many Dags there may be in one test session.
CONNECTIONS = 32

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
        self.airflow.wait_for(lambda: bool(met()), seconds)

    def wait_until_over(self, seconds: float) -> None:
        """Wait until the Dag run has ended."""
        self.wait_for(lambda: self.query("1", "dag_run", "state IN ('success', 'failed')"), seconds)


class SharedAirflow:
    """
    The Airflow and its connections.

    :param airflow: its processes.
    :param ports: a port for each connection; its socket holds it until a stand-in needs it.
    """

    def __init__(self, airflow: AirflowProcesses, ports: Mapping[str, socket.socket]) -> None:
        self.airflow = airflow
        self._free = list(ports.items())

    @contextlib.contextmanager
    def scenario(self, dag_id: str, dialect: str = "1.12.1") -> Iterator[Scenario]:
        """
        Start a stand-in that only one Dag has a connection to.

        :param dag_id: the Dag's id, unlike all others of the session.
        :param dialect: the version that the stand-in speaks like.
        """
        conn_id, holder = self._free.pop()
        port = holder.getsockname()[1]
        holder.close()
        with DifyStandIn(dialect, port=port) as dify:
            dify.api_keys = {KEY}
            scenario = Scenario(self.airflow, dify, dag_id, conn_id)
            try:
                yield scenario
            finally:
                scenario.remove_dag()


def side_by_side(scenarios: Mapping[str, Callable[[], T]]) -> dict[str, Future[T]]:
    """Run scenarios at the same time, to their ends; each one's ``result()`` returns or raises what it did."""
    with ThreadPoolExecutor(max_workers=len(scenarios)) as pool:
        return {name: pool.submit(scenario) for name, scenario in scenarios.items()}


@contextlib.contextmanager
def shared_airflow() -> Iterator[SharedAirflow]:
    """Run the Airflow."""
    ports = {f"dify_{number}": socket.create_server(("127.0.0.1", 0)) for number in range(CONNECTIONS)}
    environment = {
        f"AIRFLOW_CONN_{conn_id.upper()}": json.dumps(
            {"conn_type": "dify", "host": f"http://127.0.0.1:{holder.getsockname()[1]}/v1", "password": KEY}
        )
        for conn_id, holder in ports.items()
    }
    environment |= {
        "AIRFLOW__CORE__PARALLELISM": "6",
        # How soon a new Dag file is seen, on Airflow 3 and 2.
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
        "AIRFLOW__SCHEDULER__DAG_DIR_LIST_INTERVAL": "2",
        "AIRFLOW__LOGGING__JSON_LOGS": "True",
        # How soon another triggerer takes over, and a task whose process was killed is retried.
        "AIRFLOW__TRIGGERER__JOB_HEARTBEAT_SEC": "1",
        "AIRFLOW__TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": "4",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
        "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
    }
    try:
        with airflow_processes(environment) as airflow:
            yield SharedAirflow(airflow, ports)
    finally:
        for holder in ports.values():
            holder.close()
