"""
The tests' Airflow: a temporary home with a database of its own, made once for a whole test session.

Airflow reads its settings when it is first imported, so they stand here, before anything imports it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import pytest

AIRFLOW_HOME = Path(tempfile.mkdtemp(prefix="airflow-home-"))
atexit.register(shutil.rmtree, AIRFLOW_HOME, ignore_errors=True)

AIRFLOW_SETTINGS = {
    "AIRFLOW_HOME": str(AIRFLOW_HOME),
    "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
    "AIRFLOW__CORE__DAGS_FOLDER": str(AIRFLOW_HOME / "dags"),
    "AIRFLOW__CORE__UNIT_TEST_MODE": "False",
    "AIRFLOW__CORE__FERNET_KEY": "",
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{AIRFLOW_HOME}/airflow.db",
    "AIRFLOW__METRICS__TIMER_UNIT_CONSISTENCY": "True",
    "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
    # No proxy of the machine stands between the tests and their servers.
    "NO_PROXY": "127.0.0.1,localhost",
    "no_proxy": "127.0.0.1,localhost",
}
for name in [name for name in os.environ if name.startswith(("AIRFLOW_", "DIFY_"))]:
    del os.environ[name]
os.environ.update(AIRFLOW_SETTINGS)
(AIRFLOW_HOME / "dags").mkdir()

from tests.combinations import each_or_long  # noqa: E402
from tests.dify_stand_in import API_KEY, DIALECTS, DifyStandIn  # noqa: E402
from tests.dify_stand_in.exchanges import exchanges  # noqa: E402


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Tell the requests of the test that begins from those of other tests."""
    exchanges.begin_test()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let the report of a failed test show what was asked of its stand-ins for Dify."""
    report = yield
    if report.failed and str(exchanges):
        report.sections.append(
            ("Requests to the stand-in for Dify, with the seconds since the test began", str(exchanges))
        )
    return report


@pytest.fixture(params=each_or_long(DIALECTS, short=(DIALECTS[0], DIALECTS[-1])))
def dialect(request: pytest.FixtureRequest) -> str:
    """Each version of Dify in turn: the oldest and the newest in the short run, all in the long one."""
    return request.param


@pytest.fixture
def default_dialect() -> str:
    """The version that the stand-in speaks like where a test asks for none."""
    return "1.12.1"


@pytest.fixture
def dify(request: pytest.FixtureRequest, default_dialect: str) -> Iterator[DifyStandIn]:
    """A stand-in for Dify: in each dialect if the test asks for one, else in the default one."""
    dialect = request.getfixturevalue("dialect") if "dialect" in request.fixturenames else default_dialect
    with DifyStandIn(dialect) as server:
        yield server


@pytest.fixture
def dify_connection(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> str:
    """The Airflow connection ``dify_default``, which leads to the stand-in."""
    from airflow.models.connection import Connection

    connection = Connection(conn_id="dify_default", conn_type="dify", host=dify.base_url, password=API_KEY)
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", connection.get_uri())
    return "dify_default"


@pytest.fixture
def quick_resumption(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let deferred tasks resume at once: no executor has to see the end of a worker's process."""
    monkeypatch.setattr("airflow_provider_dify.triggers.dify.DifyWorkflowRunTrigger.resume_delay", 0.0)


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Let the hooks' ``run_workflow`` have a grace of 0.3 seconds, not of a minute; return what sets another one."""

    def use(seconds: float) -> None:
        for module in ("dify", "dify_async"):
            monkeypatch.setattr(f"airflow_provider_dify.hooks.{module}.NOT_FOUND_GRACE", seconds)

    use(0.3)
    return use


@pytest.fixture
def short_reading_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a stream be read on for half a second after an error, not for two."""
    for module in ("api.run_stream", "runs.following"):
        monkeypatch.setattr(f"airflow_provider_dify.{module}.SECONDS_AFTER_ERROR", 0.5)


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries, failed polls and searches follow each other at once."""
    from airflow_provider_dify.hooks.dify import DifyHook

    assert DifyHook.__init__.__kwdefaults__ is not None
    monkeypatch.setitem(DifyHook.__init__.__kwdefaults__, "retry_delay", 0.001)
    monkeypatch.setattr("airflow_provider_dify.triggers.dify.DifyWorkflowRunTrigger.retry_delay", 0.001)
    for module in ("following", "log", "starting"):
        monkeypatch.setattr(f"airflow_provider_dify.runs.{module}.RETRY_DELAY", 0.01)
