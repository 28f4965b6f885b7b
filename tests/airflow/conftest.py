"""What tests that run Airflow need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import AIRFLOW_HOME


@pytest.fixture(scope="session")
def airflow_db() -> Path:
    """Airflow's database, migrated."""
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], check=True, capture_output=True)
    return AIRFLOW_HOME / "airflow.db"
