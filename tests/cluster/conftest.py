"""The cluster, the stand-in for Dify, and the log of what is done to them; started once for all tests here."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
from airflow_cluster import AirflowCluster, airflow_cluster
from waits import CONN_ID

from tests.dify_stand_in import DifyStandIn

FIRST_KEY = "app-zQ9-the-first-key-of-this-test"
SECOND_KEY = "app-xV4-the-second-key-of-this-test"

Say = Callable[[str], None]


@pytest.fixture(scope="session")
def say() -> Say:
    """Print a line with the seconds since the beginning."""
    beginning = time.monotonic()
    print()
    return lambda text: print(f"{time.monotonic() - beginning:6.0f} s  {text}", flush=True)


@pytest.fixture(scope="session")
def dify() -> Iterator[DifyStandIn]:
    """The stand-in for Dify."""
    with DifyStandIn() as server:
        server.api_keys = {FIRST_KEY}
        yield server


@pytest.fixture(scope="session")
def cluster(say: Say, dify: DifyStandIn) -> Iterator[AirflowCluster]:
    """The cluster, with a connection to the stand-in in its database."""
    say("Starting PostgreSQL, Redis, api-server, dag-processor, scheduler, two triggerers and two Celery workers.")
    with airflow_cluster() as airflow:
        airflow.ask_api(
            "POST",
            "/connections",
            {"connection_id": CONN_ID, "conn_type": "dify", "host": dify.base_url, "password": FIRST_KEY},
        )
        say("The cluster is up.")
        yield airflow
        say("Stopping the cluster.")
