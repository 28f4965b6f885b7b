"""Whether a start may have arrived: only one that never had a connection is sure to have started nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp.client_reqrep import ConnectionKey

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.run_stream import AsyncWorkflowRunStream
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain

KEY = ConnectionKey("dify.example", 80, False, True, None, None, None)


class Session:
    """What a session is to a start whose request fails, with or without a connection."""

    connection = DifyConnection(conn_id="dify_default", base_url="http://dify.example/v1", api_key="app-some-key")
    proxy = None

    def __init__(self, error: Exception, *, had_connection: bool) -> None:
        self._error = error
        self._had_connection = had_connection

    def join(self, connection: DifyConnection) -> Session:
        return self

    async def leave(self) -> None: ...

    async def open_for_starts(self) -> Session:
        return self

    def post(self, url: str, **request: Any) -> Any:
        request["trace_request_ctx"].may_have_been_sent = self._had_connection
        raise self._error


@pytest.mark.parametrize(
    "error",
    [
        aiohttp.ClientConnectorError(KEY, OSError("refused")),
        aiohttp.ConnectionTimeoutError("no connection"),
        aiohttp.ServerDisconnectedError(),
        aiohttp.ClientOSError("reset"),
        aiohttp.ClientPayloadError("cut"),
        aiohttp.InvalidURL("no host"),
        OSError("a damaged record"),
        RuntimeError("whatever else"),
    ],
)
@pytest.mark.parametrize(
    ("had_connection", "expected"), [(False, DifyConnectionError), (True, DifyWorkflowRunUncertain)]
)
def test_only_a_start_that_got_no_connection_is_sure_to_have_started_nothing(
    error: Exception, had_connection: bool, expected: type[DifyError]
) -> None:
    async def start() -> None:
        session: Any = Session(error, had_connection=had_connection)
        stream = AsyncWorkflowRunStream(session, "/workflows/run", b"{}", "airflow")
        with pytest.raises(expected) as caught:
            await stream.next_event(5)
        assert type(caught.value) is expected
        # However often it is asked.
        with pytest.raises(expected):
            await stream.next_event(0)

    asyncio.run(start())
