"""
Transport to Dify's Service API on an event loop: what :mod:`airflow_provider_dify.hooks.dify` does, awaited.

All hooks of one event loop with the same settings share one client session, so that a thousand waits on one triggerer
poll over a few kept-alive connections.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from urllib.parse import urljoin
from weakref import WeakKeyDictionary

import aiohttp
import requests
from airflow.providers.common.compat.connection import get_async_connection
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy

from airflow_provider_dify.connection import HEADERS, DifyConnection
from airflow_provider_dify.exceptions import DifyAuthenticationError
from airflow_provider_dify.workflow_run import (
    HttpAnswer,
    WorkflowRun,
    canonical_workflow_run_id,
    read_stop,
    read_workflow_run,
    stop_path,
    workflow_run_path,
    workflow_run_subject,
)

if TYPE_CHECKING:
    from types import TracebackType

# More at once gain nothing, and a server that stalls must not be given all the sockets of a triggerer.
MAX_REQUESTS_AT_ONCE = 100
# Longer than polls are usually apart; most servers and proxies close earlier, which costs nothing.
KEEPALIVE_SECONDS = 75.0
MAX_REDIRECTS = 5
# A run's inputs may be megabytes, and a triggerer has many waits.
MAX_BODY_KEPT = 32_768


class DifyAsyncHook:
    """
    Look workflow runs up on an event loop, with one app's API key. Never blocks the loop, never retries by itself.

    To be used as ``async with DifyAsyncHook() as hook: ...``, which takes and gives back its share of the session.

    :param dify_conn_id: the Airflow connection, as for :class:`airflow_provider_dify.hooks.dify.DifyHook`.
    :ivar connection: the connection's settings, as last read; ``None`` until then.
    """

    def __init__(self, dify_conn_id: str = "dify_default") -> None:
        self.dify_conn_id = dify_conn_id
        self.connection: DifyConnection | None = None
        self._session: _SharedSession | None = None
        self._last_read: tuple[bytes, WorkflowRun] | None = None

    async def __aenter__(self) -> DifyAsyncHook:
        """
        Read the connection and open the session, if no one has.

        :raises DifyConfigurationError: if the connection cannot be used.
        """
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the share of the session back; the last one out closes it."""
        session, self._session = self._session, None
        if session is not None:
            await session.leave()

    async def get_workflow_run(self, workflow_run_id: str) -> WorkflowRun:
        """
        Look a workflow run up: ``GET /workflows/run/{workflow_run_id}``. One request, or two if the key was rotated.

        :param workflow_run_id: the run's UUID, in any spelling that ``uuid.UUID`` takes.
        :return: the run, whatever its status.
        :raises DifyError: as :meth:`airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run` does.
        """
        run_id = canonical_workflow_run_id(workflow_run_id)
        try:
            return self._read(await self._send(run_id), run_id)
        except DifyAuthenticationError:
            refused = self.connection
            await self._connect()
            if self.connection == refused:
                raise
            return self._read(await self._send(run_id), run_id)

    def _read(self, answer: HttpAnswer, run_id: str) -> WorkflowRun:
        # While a run goes on, poll after poll brings the same bytes, and reading them is the dearest part of a poll.
        if self._last_read is not None and answer.status_code == 200 and answer.body == self._last_read[0]:
            return self._last_read[1]
        run = read_workflow_run(answer, run_id)
        self._last_read = (answer.body, run) if len(answer.body) <= MAX_BODY_KEPT else None
        return run

    async def stop_workflow_task(self, task_id: str, user: str) -> None:
        """
        Ask Dify to stop a running workflow, as :meth:`airflow_provider_dify.hooks.dify.DifyHook.stop_workflow_task`.

        :param task_id: the task's UUID, which the stream of the start told; not the run's.
        :param user: who started the run.
        :raises DifyError: as there.
        """
        assert self._session is not None  # noqa: S101
        path = stop_path(task_id)
        read_stop(await self._session.send("POST", path, f"the stop of task {task_id}", {"user": user}))

    async def _connect(self) -> None:
        """Read the connection, and take a share of the session that goes with it."""
        connection = DifyConnection.from_airflow(await get_async_connection(self.dify_conn_id))
        if self._session is None or connection != self.connection:
            await self.close()
            self._session = _SharedSession.join(connection)
            self.connection = connection
            await self._session.open()

    async def _send(self, run_id: str) -> HttpAnswer:
        assert self.connection is not None  # noqa: S101
        assert self._session is not None  # noqa: S101
        return await self._session.send("GET", workflow_run_path(run_id), workflow_run_subject(run_id))


@dataclass(eq=False)
class _SharedSession:
    """
    A client session, and how many share it. It is opened at the first request and closed when the last one leaves.

    Joining and leaving count without an ``await`` in between, so that no cancellation can fall between the count and
    what it stands for.
    """

    connection: DifyConnection
    users: int = 0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_REQUESTS_AT_ONCE))
    client: aiohttp.ClientSession | None = None
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    proxy: str | None = None

    @classmethod
    def join(cls, connection: DifyConnection) -> _SharedSession:
        sessions = _sessions.setdefault(asyncio.get_running_loop(), {})
        shared = sessions.setdefault(connection, cls(connection))
        shared.users += 1
        return shared

    async def leave(self) -> None:
        self.users -= 1
        if self.users:
            return
        sessions = _sessions.get(asyncio.get_running_loop(), {})
        # Out of reach before the first await: who comes now opens a session of its own.
        if sessions.get(self.connection) is self:
            del sessions[self.connection]
        client, self.client = self.client, None
        if client is not None:
            # Shielded, because a cancelled trigger must not leave its sockets behind.
            await asyncio.shield(client.close())

    async def send(self, method: str, path: str, subject: str, body: dict[str, str] | None = None) -> HttpAnswer:
        """Send a request and give the whole answer; a GET follows redirects within the connection's server."""
        first_url = url = f"{self.connection.base_url}{path}"
        for _ in range(MAX_REDIRECTS):
            answer = await self._send_once(method, url, subject, body)
            redirects = method == "GET" and 300 <= answer.status_code < 400
            location = answer.header("Location") if redirects else None
            if location is None or not self.connection.owns(urljoin(url, location)):
                break
            url = urljoin(url, location)
        return answer if url == first_url else replace(answer, url=first_url)

    async def _send_once(self, method: str, url: str, subject: str, body: dict[str, str] | None) -> HttpAnswer:
        # The wait for a slot is outside the timeout: that others are slow is no failure of this poll.
        async with self.slots:
            client = self.client or await self.open()
            try:
                try:
                    return await self._request(client, method, url, body)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    # Most likely a kept-alive connection that the server closed just now; a new one tells.
                    return await self._request(client, method, url, body)
            except (aiohttp.ClientError, asyncio.TimeoutError, OSError, ValueError) as error:
                raise self.connection.unreachable(subject, url, error) from error

    async def _request(
        self, client: aiohttp.ClientSession, method: str, url: str, body: dict[str, str] | None
    ) -> HttpAnswer:
        async with client.request(method, url, json=body, allow_redirects=False, proxy=self.proxy) as response:
            return self.connection.answered(url, response.status, response.headers, await response.read())

    async def open(self) -> aiohttp.ClientSession:
        """Give the client, made by the first who asks."""
        async with self.opening:
            if self.client is None:
                # In a thread: certificates are read from disk, and the environment is asked for a proxy.
                self.proxy, tls = await asyncio.to_thread(_proxy_and_tls, self.connection)
                connect, read = self.connection.timeouts()
                self.client = aiohttp.ClientSession(
                    connector=aiohttp.TCPConnector(
                        limit=MAX_REQUESTS_AT_ONCE, keepalive_timeout=KEEPALIVE_SECONDS, ssl=tls
                    ),
                    # One timer for the whole answer, where requests has one for each piece of it: a trigger's slot
                    # must not be held by a server that sends a byte at a time.
                    timeout=aiohttp.ClientTimeout(total=connect + read, sock_connect=connect),
                    # The key may stand here: this session is one connection's, and follows no redirect by itself.
                    headers={**HEADERS, "Authorization": f"Bearer {self.connection.api_key}"},
                    cookie_jar=aiohttp.DummyCookieJar(),
                )
            return self.client


_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[DifyConnection, _SharedSession]] = WeakKeyDictionary()


def _proxy_and_tls(connection: DifyConnection) -> tuple[str | None, ssl.SSLContext | bool]:
    """Say which proxy and which certificates ``requests`` would use, so that both clients go the same way."""
    with requests.Session() as session:
        verify = None if connection.verify is True else connection.verify
        settings = session.merge_environment_settings(
            connection.base_url, dict(connection.proxies), stream=None, verify=verify, cert=None
        )
    proxy = select_proxy(connection.base_url, settings["proxies"])
    if settings["verify"] is False:
        return proxy, False
    bundle = settings["verify"] if isinstance(settings["verify"], str) else DEFAULT_CA_BUNDLE_PATH
    if os.path.isdir(bundle):
        return proxy, ssl.create_default_context(capath=bundle)
    return proxy, ssl.create_default_context(cafile=bundle)
