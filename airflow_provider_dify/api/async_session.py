"""
How requests travel on an event loop: as on a worker, over a session that all who share a connection share.

A thousand waits on one triggerer poll over a few kept-alive connections.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urljoin
from weakref import WeakKeyDictionary

import aiohttp

from airflow_provider_dify.api.calls import LiveTaskId, events_path
from airflow_provider_dify.api.connection import HEADERS, DifyConnection
from airflow_provider_dify.api.events import EventStreamReader
from airflow_provider_dify.api.http_response import HttpResponse, no_response
from airflow_provider_dify.api.live_task_id import task_id_from
from airflow_provider_dify.api.network import load_bundle, route_to

if TYPE_CHECKING:
    from typing_extensions import Self


class Shared:
    """
    Mixed into what is shared: made by the first who joins with a key, closed when the last one leaves.

    Joining and leaving count without an ``await`` in between, so that no cancellation can fall between the count and
    what it stands for.
    """

    users: int = 0
    # What there is of each class, by event loop and key.
    on_loops: ClassVar[WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Any, Any]]]

    def __init_subclass__(cls) -> None:
        cls.on_loops = WeakKeyDictionary()

    @classmethod
    def join(cls, key: Hashable) -> Self:
        """Return what this event loop shares for a key, and count one more who uses it."""
        existing = cls.on_loops.setdefault(asyncio.get_running_loop(), {})
        shared: Self = existing.setdefault(key, cls(key))  # type: ignore[call-arg]  # of the class that this is mixed into
        shared.users += 1
        return shared

    async def leave(self) -> None:
        """Count one less, and close it after the last one."""
        self.users -= 1
        if self.users:
            return
        existing = self.on_loops.get(asyncio.get_running_loop(), {})
        # Out of reach before the first await: who comes now makes one of its own.
        for key in [key for key, shared in existing.items() if shared is self]:
            del existing[key]
        # Shielded, because a cancelled trigger must not leave its sockets behind.
        await asyncio.shield(self._close())

    def _close(self) -> Awaitable[Any]:
        raise NotImplementedError


# More at once gain nothing, and a server that stalls must not be given all the sockets of a triggerer.
MAX_REQUESTS_AT_ONCE = 100
# Longer than polls are usually apart; most servers and proxies close earlier, which costs nothing.
KEEPALIVE_SECONDS = 75.0
# Shorter than any server's: gunicorn, which Dify runs on, closes an idle connection after two seconds.
KEEPALIVE_OF_STARTS = 1.0
MAX_REDIRECTS = 5
# Bytes of a header, as many as http.client takes on a worker: a gateway's Content-Security-Policy may be longer than
# aiohttp's 8,190.
MAX_HEADER = 65_536


@dataclass(eq=False)
class SharedSession(Shared):
    """A client session that all share who use a connection on an event loop. It is opened at the first request."""

    connection: DifyConnection
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_REQUESTS_AT_ONCE))
    client: aiohttp.ClientSession | None = None
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    proxy: str | None = None
    tls: ssl.SSLContext | bool = True
    # By whether they keep their connections.
    starters: dict[bool, aiohttp.ClientSession] = field(default_factory=dict)
    # Whether the server has closed a kept connection in front of a start.
    has_lost_start: bool = False

    def _close(self) -> Awaitable[Any]:
        clients = [client for client in (self.client, *self.starters.values()) if client is not None]
        self.client, self.starters = None, {}
        return asyncio.gather(*(client.close() for client in clients))

    async def send(
        self,
        method: str,
        path: str,
        subject: str,
        *,
        params: Mapping[str, Any] | None = None,
        body: Mapping[str, Any] | None = None,
        patience: float = 0.0,
    ) -> HttpResponse:
        """
        Send a request and return the whole response; a GET follows redirects within the connection's server.

        :param patience: seconds for the response at least, whatever the connection says.
        :raises DifyConnectionError: if there is none.
        """
        first_url = url = f"{self.connection.base_url}{path}"
        for _ in range(MAX_REDIRECTS):
            # The query goes with the first request only: a redirect names its own.
            response = await self._send_once(method, url, subject, params if url == first_url else None, body, patience)
            target = self._redirect_target(url, response) if method == "GET" else None
            if target is None:
                break
            url = target
        return response if url == first_url else replace(response, url=first_url)

    def _redirect_target(self, url: str, response: HttpResponse) -> str | None:
        location = response.header("Location") if 300 <= response.status_code < 400 else None
        try:
            target = urljoin(url, location) if location else ""
        except ValueError:
            return None
        return target if target and self.connection.owns(target) else None

    async def _send_once(
        self,
        method: str,
        url: str,
        subject: str,
        params: Mapping[str, Any] | None,
        body: Mapping[str, Any] | None,
        patience: float,
    ) -> HttpResponse:
        # The wait for a slot is outside the timeout: that others are slow is no failure of this poll.
        async with self.slots:
            client = self.client or await self.open()
            try:
                try:
                    return await self._request(client, method, url, params, body, patience)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    # Most likely a kept-alive connection that the server closed just now; a new one tells.
                    return await self._request(client, method, url, params, body, patience)
            except Exception as error:
                # Whatever the client calls it, and whatever the server or a proxy said to cause it.
                failure = no_response(self.connection, subject, url, error)
        # Outside of the handler: the client's own error, which a log would show as the cause, may quote a password.
        raise failure

    async def _request(
        self,
        client: aiohttp.ClientSession,
        method: str,
        url: str,
        params: Mapping[str, Any] | None,
        body: Mapping[str, Any] | None,
        patience: float,
    ) -> HttpResponse:
        connect, total = self.connection.timeouts()
        # Elsewhere the client's own limits.
        longer: Any = (
            {"timeout": aiohttp.ClientTimeout(total=patience, sock_connect=connect)} if patience > total else {}
        )
        async with client.request(
            method, url, params=params, json=body, allow_redirects=False, proxy=self.proxy, **longer
        ) as response:
            return HttpResponse.received(self.connection, url, response.status, response.headers, await response.read())

    async def read_live_task_id(self, step: LiveTaskId) -> str | None:
        """Return a live run's task id, as :mod:`airflow_provider_dify.api.live_task_id`; the caller bounds the time."""
        client = self.client or await self.open()
        reader = EventStreamReader()
        url = f"{self.connection.base_url}{events_path(step.workflow_run_id)}"
        async with client.get(url, params={"user": step.user}, allow_redirects=False, proxy=self.proxy) as response:
            async for piece in response.content.iter_any():
                if not response.ok:
                    break
                if task_id := task_id_from(reader, piece, step.workflow_run_id):
                    return task_id
        return None

    async def open(self) -> aiohttp.ClientSession:
        """
        Return the client, made by the first who asks.

        :raises DifyConfigurationError: if the environment's or the connection's proxy or CA bundle can't be used.
        """
        async with self.opening:
            if self.client is None:
                # In a thread: certificates are read from disk, and the environment is asked for a proxy.
                self.proxy, self.tls = await asyncio.to_thread(_proxy_and_tls, self.connection)
                connect, total = self.connection.timeouts()
                self.client = self._new_client(
                    aiohttp.TCPConnector(limit=MAX_REQUESTS_AT_ONCE, keepalive_timeout=KEEPALIVE_SECONDS, ssl=self.tls),
                    # One timer for the whole response, where requests has one for each piece of it: a trigger's slot
                    # must not be held by a server that sends a byte at a time.
                    aiohttp.ClientTimeout(total=total, sock_connect=connect),
                )
            return self.client

    async def open_for_starts(self, keeps_connections: bool) -> aiohttp.ClientSession:
        """
        Return the client that starts go through.

        A request says by ``trace_request_ctx``, whose ``may_have_been_sent`` is set, when it has its connection.

        :param keeps_connections: whether a start may go over the connection of one that has just ended, which saves a
            TLS handshake. If the server closes that connection at this very moment, nobody can tell whether the start
            arrived, and it has to be looked for in Dify's log; later starts then have a connection each. So have all
            where this is not set.
        :raises DifyConfigurationError: as :meth:`open` does.
        """
        await self.open()
        keeps_connections = keeps_connections and not self.has_lost_start
        if keeps_connections not in self.starters:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(_note_connection)
            trace.on_connection_reuseconn.append(_note_kept_connection)
            kept: dict[str, Any] = {"keepalive_timeout": KEEPALIVE_OF_STARTS}
            self.starters[keeps_connections] = self._new_client(
                # Who starts runs limits how many, and a run that waits for a socket would look like a queued one.
                aiohttp.TCPConnector(limit=0, ssl=self.tls, **(kept if keeps_connections else {"force_close": True})),
                # No timer for the response: a queued run is silent for as long as it is queued.
                aiohttp.ClientTimeout(total=None, connect=self.connection.timeouts()[0]),
                trace_configs=[trace],
            )
        return self.starters[keeps_connections]

    def _new_client(
        self, connector: aiohttp.TCPConnector, timeout: aiohttp.ClientTimeout, **settings: Any
    ) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            # The key may stand here: this session is one connection's, and follows no redirect by itself.
            headers={**HEADERS, "Authorization": f"Bearer {self.connection.api_key}"},
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            **settings,
        )


async def _note_connection(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    context.trace_request_ctx.may_have_been_sent = True


async def _note_kept_connection(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    context.trace_request_ctx.may_have_been_sent = context.trace_request_ctx.is_on_kept_connection = True


def _proxy_and_tls(connection: DifyConnection) -> tuple[str | None, ssl.SSLContext | bool]:
    """Return the proxy and the certificates that ``requests`` would use, so that both clients go the same way."""
    route = route_to(connection, takes_socks=False)
    return route.proxy, route.verify if isinstance(route.verify, bool) else load_bundle(route.verify)
