"""Whether a start may have arrived where nothing shows if a byte of it went out: over a SOCKS proxy."""

from __future__ import annotations

from typing import Any

import pytest
import requests
from urllib3 import HTTPConnectionPool
from urllib3.connection import HTTPConnection
from urllib3.exceptions import MaxRetryError, NewConnectionError, ProtocolError

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.run_stream import WorkflowRunStream
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain

URL = "http://dify.example/v1/workflows/run"
POOL = HTTPConnectionPool("dify.example")
REFUSED = NewConnectionError(HTTPConnection("dify.example"), "refused")


class Session:
    """What a session is to a start, where a request fails and nothing was observed of it."""

    was_sent = None

    def __init__(self, error: Exception) -> None:
        self._error = error

    def post(self, *args: Any, **kwargs: Any) -> Any:
        raise self._error

    def abort(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (requests.ConnectTimeout("no connection"), DifyConnectionError),
        (requests.ConnectionError(MaxRetryError(POOL, URL, REFUSED)), DifyConnectionError),
        (requests.exceptions.InvalidURL("no host"), DifyConnectionError),
        (requests.ConnectionError(MaxRetryError(POOL, URL, ProtocolError("reset"))), DifyWorkflowRunUncertain),
        (requests.ConnectionError("reset"), DifyWorkflowRunUncertain),
        (requests.ConnectionError(), DifyWorkflowRunUncertain),
        (requests.ReadTimeout("no response"), DifyWorkflowRunUncertain),
        (requests.exceptions.SSLError("a damaged record"), DifyWorkflowRunUncertain),
    ],
)
def test_only_a_start_that_got_no_connection_is_sure_to_have_started_nothing(
    error: Exception, expected: type[DifyError]
) -> None:
    connection = DifyConnection(conn_id="dify_default", base_url="http://dify.example/v1", api_key="app-some-key")
    session: Any = Session(error)
    stream = WorkflowRunStream(connection, session, URL, b"{}", "airflow")
    with pytest.raises(expected) as caught:
        stream.next_event(5)
    assert type(caught.value) is expected
    # However often it is asked.
    with pytest.raises(expected):
        stream.next_event(0)
