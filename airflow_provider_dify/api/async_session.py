"""How requests travel on an event loop."""

from __future__ import annotations

import asyncio
import os
import ssl
from dataclasses import dataclass, field, replace
from urllib.parse import urljoin
from weakref import WeakKeyDictionary

import aiohttp
import requests
from requests.utils import DEFAULT_CA_BUNDLE_PATH, select_proxy

from airflow_provider_dify.api.responses import HttpAnswer, answered, unreachable
from airflow_provider_dify.connection import HEADERS, DifyConnection

# More at once gain nothing, and a server that stalls must not be given all the sockets of a triggerer.
MAX_REQUESTS_AT_ONCE = 100
# Longer than polls are usually apart; most servers and proxies close earlier, which costs nothing.
KEEPALIVE_SECONDS = 75.0
MAX_REDIRECTS = 5


@dataclass(eq=False)
class SharedSession:
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
    def join(cls, connection: DifyConnection) -> SharedSession:
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
                raise unreachable(self.connection, subject, url, error) from error

    async def _request(
        self, client: aiohttp.ClientSession, method: str, url: str, body: dict[str, str] | None
    ) -> HttpAnswer:
        async with client.request(method, url, json=body, allow_redirects=False, proxy=self.proxy) as response:
            return answered(self.connection, url, response.status, response.headers, await response.read())

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


_sessions: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[DifyConnection, SharedSession]] = WeakKeyDictionary()


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
