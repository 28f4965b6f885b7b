"""What many waits cost Airflow when a triggerer starts again, beside dbt Cloud's; prints a table."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psycopg2
import pytest
import requests
import trustme
from conftest import Say  # noqa: TC002
from deferred_waits import DAG, POLL_INTERVAL
from servers import postgresql

from benchmarks import server
from tests.airflow.airflow_processes import AirflowProcesses

HERE = Path(__file__).parent
NAMES = {"dify": "`DifyWorkflowRunTrigger`", "dbt": "dbt Cloud's `DbtCloudRunJobTrigger`"}
COUNTS = [int(count) for count in os.environ.get("WAITS", "100 1000").split()]
# Seconds after the last first poll in which nothing may be read again: longer than a reading counts.
SECONDS_AFTER = 70.0


@dataclass(frozen=True)
class Restart:
    """
    What one start of a triggerer with waits took.

    :param first_poll: seconds from the start of the process to the first poll.
    :param last_first_poll: seconds from the start of the process to the moment at which each wait has polled.
    :param readings: how often a connection was read from Airflow's database.
    :param xcoms: rows of XComs that were written.
    """

    first_poll: float
    last_first_poll: float
    readings: int
    xcoms: int


class Airflow(AirflowProcesses):
    """
    PostgreSQL and a triggerer; nothing else runs, so that what the database counts is the triggerer's.

    :param home: a folder.
    :param database: PostgreSQL's address.
    :param environment: the connections.
    """

    def __init__(self, home: Path, database: str, environment: dict[str, str]) -> None:
        self.database = database
        settings = {
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{database}",
            "AIRFLOW__CORE__DAGS_ARE_PAUSED_AT_CREATION": "True",
            # More than the waits, so that all of them are at work.
            "AIRFLOW__TRIGGERER__CAPACITY": "2000",
            # No proxy of the machine stands between the waits and the server.
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        super().__init__(home, {**settings, **environment}, quick=False)
        (self.dags / "deferred.py").write_text(DAG)

    def counted(self, table: str, columns: str) -> int:
        """Return a number of PostgreSQL's statistics; sessions write theirs at the latest when they end."""
        with contextlib.closing(psycopg2.connect(f"postgresql://{self.database}")) as db, db.cursor() as cursor:
            cursor.execute(f"SELECT {columns} FROM pg_stat_user_tables WHERE relname = %s", (table,))
            ((number,),) = cursor.fetchall()
        return int(number)

    @property
    def readings(self) -> int:
        return self.counted("connection", "seq_scan + coalesce(idx_scan, 0)")

    @property
    def xcoms(self) -> int:
        return self.counted("xcom", "n_tup_ins + n_tup_upd + n_tup_del")

    def defer(self, kind: str, count: int) -> None:
        """Put waits into the database."""
        script = [sys.executable, str(HERE / "deferred_waits.py"), kind, str(count)]
        subprocess.run(script, env=self.environment, check=True, stdout=subprocess.DEVNULL)


class Polled:
    """
    The server that all waits poll, whose runs never end.

    :param control: the URL to control it.
    """

    def __init__(self, control: str) -> None:
        self.control = control

    def forget(self) -> None:
        """Count from zero."""
        scenario = {"finish_at": 1e12, "finish_over": 0.0}
        requests.post(f"{self.control}/scenario", json=scenario, timeout=30).raise_for_status()

    def first_polls(self) -> list[float]:
        """Return when each wait polled first, on the monotonic clock, which all processes of a machine share."""
        polls = requests.get(f"{self.control}/stats", timeout=30).json()["polls"]
        return sorted(min(moments) for moments in polls.values())


@pytest.fixture(scope="module")
def restarts(say: Say) -> Iterator[dict[tuple[str, int], Restart]]:
    """What each restart took; printed as a table."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="triggerer-restarts-") as folder, postgresql() as database:
        home = Path(folder)
        ca = trustme.CA()
        ca.cert_pem.write_to_path(str(home / "ca.pem"))
        ca.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(home / "server.pem"))
        here, there = spawn.Pipe()
        serving = spawn.Process(
            target=server.main, args=(None, home / "server.pem", home / "server.out", there), daemon=True
        )
        serving.start()
        there.close()
        try:
            port, control_port = here.recv()
            dify = {"conn_type": "dify", "host": f"https://127.0.0.1:{port}/v1", "password": "of-this-test"}
            dbt = {"conn_type": "dbt_cloud", "host": f"127.0.0.1:{port}", "login": "1", "password": "of-this-test"}
            trusted = dict.fromkeys(("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"), str(home / "ca.pem"))
            airflow = Airflow(home, database, trusted)
            airflow.run("db", "migrate")
            for kind, connection in (("dify", dify), ("dbt", dbt)):
                airflow.run("connections", "add", kind, "--conn-json", json.dumps(connection))
            airflow.run("dags", "reserialize")
            polled = Polled(f"http://127.0.0.1:{control_port}")
            measured = {}
            for count in COUNTS:
                for kind in NAMES:
                    airflow.defer(kind, count)
                    measured[kind, count] = restart(airflow, polled, count, SECONDS_AFTER if kind == "dify" else 0.0)
                    say(f"{count} waits of {NAMES[kind]}: {measured[kind, count]}")
            print_table(measured)
            yield measured
        finally:
            serving.terminate()
            serving.join()


def restart(airflow: Airflow, polled: Polled, count: int, seconds_after: float) -> Restart:
    """Measure the start of a triggerer; as after a restart, the waits are in the database."""
    polled.forget()
    readings, xcoms = airflow.readings, airflow.xcoms
    began = time.monotonic()
    airflow.start("triggerer")
    airflow.wait_for(lambda: len(polled.first_polls()) >= count, seconds=300)
    first_polls = polled.first_polls()
    time.sleep(seconds_after)
    airflow.stop("triggerer")
    return Restart(first_polls[0] - began, first_polls[-1] - began, airflow.readings - readings, airflow.xcoms - xcoms)


def print_table(measured: dict[tuple[str, int], Restart]) -> None:
    """Print what was measured, for docs/scaling.md."""
    print(
        f"\nWaits with a poll every {POLL_INTERVAL:g} s, from the start of the triggerer's process:\n\n"
        "| trigger | waits | first poll | last wait's first poll | connection readings | XComs written |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |"
    )
    for (kind, count), took in measured.items():
        seconds = f"{took.first_poll:.1f} s | {took.last_first_poll:.1f} s"
        print(f"| {NAMES[kind]} | {count:,} | {seconds} | {took.readings:,} | {took.xcoms:,} |")
    print(flush=True)


def test_the_waits_of_a_triggerer_that_starts_again_read_their_connection_once_a_minute(
    restarts: dict[tuple[str, int], Restart],
) -> None:
    for count in COUNTS:
        took = restarts["dify", count]
        assert 1 <= took.readings <= 1 + took.last_first_poll // 60
        # A worker has pushed the link.
        assert took.xcoms == 0
        # What the database counts are readings: one of each wait where none is shared.
        assert restarts["dbt", count].readings >= count
