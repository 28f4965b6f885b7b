"""PostgreSQL and Redis on free ports and in temporary folders, as processes of this test's own."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.airflow.airflow_processes import free_port

# Where Debian keeps PostgreSQL's binaries, off the PATH; the newest first.
OFF_THE_PATH = sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)
# initdb and postgres refuse to run as root.
POSTGRESQL_USER: dict[str, Any] = (
    {"user": "postgres", "group": "postgres", "extra_groups": []} if os.getuid() == 0 else {}
)


def binary(name: str) -> str:
    """Find a program, or say what is missing."""
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *OFF_THE_PATH]))
    assert found, f"{name} is not installed: run tests/cluster/install_servers.sh"
    return found


@contextlib.contextmanager
def postgresql() -> Iterator[str]:
    """Run PostgreSQL with an empty database; give its address, such as ``airflow@127.0.0.1:5432/airflow``."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="postgresql-") as folder:
        if POSTGRESQL_USER:
            shutil.chown(folder, POSTGRESQL_USER["user"], POSTGRESQL_USER["group"])
        data = f"{folder}/data"
        subprocess.run(
            [
                binary("initdb"),
                "--pgdata",
                data,
                "--username=airflow",
                "--auth=trust",
                "--encoding=UTF8",
                "--no-locale",
            ],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            **POSTGRESQL_USER,
        )
        options = {"port": port, "listen_addresses": "127.0.0.1", "unix_socket_directories": "", "max_connections": 300}
        command = [binary("postgres"), "-D", data, *(f"--{name}={value}" for name, value in options.items())]
        # Interrupted, it ends its connections and stops; terminated, it would wait for them.
        with _running(command, port, Path(folder) / "log", signal.SIGINT, cwd=folder, **POSTGRESQL_USER):
            subprocess.run(
                [binary("createdb"), "--host=127.0.0.1", f"--port={port}", "--username=airflow", "airflow"], check=True
            )
            yield f"airflow@127.0.0.1:{port}/airflow"


@contextlib.contextmanager
def redis(home: Path) -> Iterator[str]:
    """Run Redis, with everything that passes through it written to a file in ``home``; give its URL."""
    port = free_port()
    command = [binary("redis-server"), "--bind", "127.0.0.1", "--port", str(port), "--dir", str(home)]
    with _running([*command, "--save", "", "--appendonly", "yes"], port, home / "redis.out", signal.SIGTERM):
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def _running(command: list[str], port: int, log: Path, end: signal.Signals, **options: Any) -> Iterator[None]:
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True, **options)
    try:
        until = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            assert time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.send_signal(end)
        process.wait(30)
