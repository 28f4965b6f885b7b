"""What tests that run Airflow need."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event
from sqlalchemy.engine import Engine

from tests.airflow import shared_airflow
from tests.airflow.airflow_processes import ends_of_logs, task_logs
from tests.airflow.airflow_runs import OPERATOR_WAYS, SENSOR_WAYS, START_WAYS
from tests.airflow.empty_airflow import copy_migrated_airflow
from tests.airflow.shared_airflow import SharedAirflow
from tests.combinations import each_or_long
from tests.conftest import AIRFLOW_HOME


@pytest.fixture(autouse=True)
def in_one_process(quick_resumption: None) -> None:
    """Let what ``dag.test()`` defers resume at once."""


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale the waits of a start down, as the stand-in's runs are."""
    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_BEFORE_DEFERRAL", 0.3)
    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_BEFORE_QUEUED", 0.1)


@pytest.fixture(scope="session")
def airflow_db() -> Path:
    """Airflow's database, migrated."""
    copy_migrated_airflow(AIRFLOW_HOME)
    event.listen(Engine, "connect", _write_later)
    return AIRFLOW_HOME / "airflow.db"


def _write_later(connection: Any, _: Any) -> None:
    # Nobody needs the database after a power cut, and each wait for the disk takes milliseconds.
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous=OFF")


@pytest.fixture(params=each_or_long(SENSOR_WAYS, short=("poke", "deferrable")))
def sensor_way(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each way in which a sensor waits: all of them in the long run."""
    return SENSOR_WAYS[request.param]


@pytest.fixture(params=each_or_long(OPERATOR_WAYS, short=("worker", "deferrable")))
def operator_way(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each way in which an operator waits: all of them in the long run."""
    return OPERATOR_WAYS[request.param]


@pytest.fixture(params=each_or_long(START_WAYS, short=("deferrable",)))
def start_way(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Each way of an operator, and a start without a wait: all of them in the long run."""
    return START_WAYS[request.param]


@pytest.fixture
def everything_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> Callable[[], str]:
    """Return all that was logged: Airflow 2 logs through logging, Airflow 3 prints what its structured log says."""
    caplog.set_level("INFO")
    printed: list[str] = []

    def said_so_far() -> str:
        printed.extend(capfd.readouterr())
        return "".join(printed) + caplog.text

    return said_so_far


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let a test in each dialect and each way have every dialect and every way in the short run, not each pair."""
    of_tests: dict[Any, list[tuple[pytest.Item, str, str]]] = {}
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        way = next((str(values[name]) for name in ("sensor_way", "operator_way", "start_way") if name in values), None)
        if way is not None and "dialect" in values and item.get_closest_marker("long") is None:
            of_tests.setdefault(getattr(item, "function", None), []).append((item, values["dialect"], way))
    for found in of_tests.values():
        dialects, ways = (list(dict.fromkeys(names)) for names in list(zip(*found, strict=True))[1:])
        for item, dialect, way in found:
            if len(dialects) > 1 and (dialects.index(dialect) + ways.index(way)) % 2:
                item.add_marker(pytest.mark.long)


@pytest.fixture(autouse=True, scope="module")
def task_logs_of_the_module() -> None:
    """Forget the task logs of the modules before."""
    task_logs.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let the report of a failed test show what its tasks logged on real Airflow processes."""
    report = yield
    if report.failed and task_logs:
        report.sections.append(("Ends of the task logs", ends_of_logs(task_logs)))
    return report


@pytest.fixture(scope="session")
def shared() -> Iterator[SharedAirflow]:
    """An Airflow of real processes for all tests that need no settings of their own."""
    with shared_airflow.shared_airflow() as airflow:
        yield airflow
