"""What several files of unit tests share."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.dify_stand_in import DifyStandIn
from tests.unit.relays import make_certificate


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, Path]:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def secure_dify(certificate: tuple[ssl.SSLContext, Path]) -> Iterator[DifyStandIn]:
    """A server with a certificate that nobody has signed but itself."""
    with DifyStandIn(tls=certificate[0]) as server:
        yield server
