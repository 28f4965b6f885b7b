"""What tests that run Airflow need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.airflow import shared_airflow
from tests.airflow.empty_airflow import copy_migrated_airflow
from tests.airflow.shared_airflow import SharedAirflow
from tests.conftest import AIRFLOW_HOME


@pytest.fixture(autouse=True)
def in_one_process(quick_resumption: None) -> None:
    """Let what ``dag.test()`` defers resume at once."""


@pytest.fixture(scope="session")
def airflow_db() -> Path:
    """Airflow's database, migrated."""
    copy_migrated_airflow(AIRFLOW_HOME)
    return AIRFLOW_HOME / "airflow.db"


@pytest.fixture(scope="session")
def shared() -> Iterator[SharedAirflow]:
    """An Airflow of real processes for all tests that need no settings of their own."""
    with shared_airflow.shared_airflow() as airflow:
        yield airflow
