"""What several files of unit tests share."""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dify_stand_in import API_KEY, DifyStandIn
from tests.unit.relays import make_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure_dify(certificate: tuple[ssl.SSLContext, Path]) -> Iterator[DifyStandIn]:
    """A server with a certificate that nobody has signed but itself."""
    with DifyStandIn(tls=certificate[0]) as server:
        yield server


@pytest.fixture
def full_server(dify_connection: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Lead the connection to a server that takes none: that is given up after 0.3 seconds, a response after 30."""
    monkeypatch.setattr("airflow_provider_dify.api.connection.MAX_CONNECT_TIMEOUT", 0.3)
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        # Nobody accepts, so the queue stays full: what connects now gets no answer.
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        host = f"http://127.0.0.1:{full.getsockname()[1]}/v1"
        fields = {"conn_type": "dify", "host": host, "password": API_KEY, "extra": {"timeout": 30}}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
        yield
