"""An empty Airflow, made once for all the processes of a test session: that takes as long as a hundred tests."""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# xdist gives all its processes one name of the session.
SESSION = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
_FOLDER = Path(tempfile.gettempdir()) / f"airflow-migrated-{SESSION}"


def copy_migrated_airflow(home: Path) -> None:
    """
    Copy an empty Airflow: its database with all tables, and its configuration.

    Without a configuration each process would write one, with a key of its own to encrypt what others have to read.

    :param home: Airflow's home; a configuration that is there stays.
    """
    with locked(_FOLDER):
        migrated = _FOLDER / "airflow.db"
        if not migrated.exists():
            atexit.register(_remove)
            _migrate(_FOLDER / "unfinished.db")
            (_FOLDER / "unfinished.db").rename(migrated)
        shutil.copy(migrated, home)
        configuration = home / "airflow.cfg"
        if not configuration.exists():
            text = (_FOLDER / "airflow.cfg").read_text(encoding="utf-8")
            configuration.write_text(text.replace(str(_FOLDER), str(home)), encoding="utf-8")


def _migrate(database: Path) -> None:
    environment = {
        **os.environ,
        "AIRFLOW_HOME": str(_FOLDER),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{database}",
    }
    subprocess.run([sys.executable, "-m", "airflow", "db", "migrate"], env=environment, check=True, capture_output=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let one process at a time do something with a folder, which is there then."""
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield


def _remove() -> None:
    # Who comes later migrates another one.
    with locked(_FOLDER):
        shutil.rmtree(_FOLDER, ignore_errors=True)
    _FOLDER.with_suffix(".lock").unlink(missing_ok=True)
