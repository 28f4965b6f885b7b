"""The package's client for Dify's API works where no Airflow is installed."""

from __future__ import annotations

import subprocess
import sys

from tests.dify_stand_in import API_KEY, DifyStandIn

PROGRAM = """
import asyncio
import sys


class NoAirflow:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "airflow":
            raise ImportError(f"No module named {name!r}")


sys.meta_path.insert(0, NoAirflow())

from airflow_provider_dify.api.calls import run_detail
from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.session import DifySession

base_url, api_key = sys.argv[1:]
connection = DifyConnection("", base_url, api_key)


async def read_connection(refused):
    return connection


async def run():
    async with DifyClient(read_connection) as client:
        async with client.send_start({}, "me") as stream:
            await stream.require_name(10)
            print([event.name async for event in stream][-1])
        print((await client.perform(run_detail(stream.workflow_run_id))).status.value)


asyncio.run(run())
with DifySession(connection) as session:
    print(session.receive("GET", "/info", "the app", time_limit_seconds=10).status_code)
"""


def test_a_run_is_started_followed_and_looked_up_without_airflow(dify: DifyStandIn) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, dify.base_url, API_KEY], capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["workflow_finished", "succeeded", "200"], done.stderr
