"""What tests that run Airflow need."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.airflow import shared_airflow
from tests.airflow.migrated_database import copy_migrated_database
from tests.airflow.shared_airflow import SharedAirflow
from tests.conftest import AIRFLOW_HOME


@pytest.fixture(scope="session")
def airflow_db() -> Path:
    """Airflow's database, migrated."""
    database = AIRFLOW_HOME / "airflow.db"
    copy_migrated_database(database)
    return database


@pytest.fixture(scope="session")
def shared() -> Iterator[SharedAirflow]:
    """An Airflow of real processes for all tests that need no settings of their own."""
    with shared_airflow.shared_airflow() as airflow:
        yield airflow
