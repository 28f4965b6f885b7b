# SPDX-License-Identifier: Apache-2.0
"""One app's requests on an event loop: with the connection's present key, each once, none longer than its deadline."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar
from urllib.parse import unquote, urljoin, urlsplit
from weakref import WeakKeyDictionary, WeakSet

import aiohttp
from multidict import CIMultiDict

from airflow_provider_dify.api.calls import Call, encode_start, start_path
from airflow_provider_dify.api.connection import HEADERS, DifyConnection
from airflow_provider_dify.api.events import EventStreamReader
from airflow_provider_dify.api.http_response import HttpResponse, no_response
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.api.run_stream import NO_EXTRAS, AsyncWorkflowRunStream, StartExtras
from airflow_provider_dify.api.session import load_bundle, route_to
from airflow_provider_dify.exceptions import DifyAuthenticationError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self


class Shared:
    """
    Mixed into what is shared: made by the first who joins with a key, closed when the last one leaves. Both count
    without an ``await`` in between, so that no cancellation can fall between the count and what it stands for.
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
        if key not in existing:
            existing[key] = cls(key)  # type: ignore[call-arg]  # of the class that this is mixed into
        shared: Self = existing[key]
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
KEEPALIVE_SECONDS_OF_STARTS = 1.0
MAX_REDIRECTS = 5
# Bytes of a header, as many as http.client takes on a worker: a gateway's Content-Security-Policy may be longer than
# aiohttp's 8,190.
MAX_HEADER = 65_536
_SOCKS_PORT = 1080


@dataclass(eq=False)
class SharedSession(Shared):
    """A client session that all share who use a connection on an event loop. It is opened at the first request."""

    connection: DifyConnection
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_REQUESTS_AT_ONCE))
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    client: aiohttp.ClientSession | None = None
    # What starts go through, and whether one may go over the connection of one that has just ended.
    starter: aiohttp.ClientSession | None = None
    keeps_connections: bool = False
    tls: ssl.SSLContext | bool = True
    # An HTTP proxy goes with each request, a SOCKS proxy with the connector.
    proxy: str | None = None
    socks_proxy: str | None = None

    def _close(self) -> Awaitable[Any]:
        clients = [client for client in (self.client, self.starter) if client is not None]
        self.client = self.starter = None
        return asyncio.gather(*(client.close() for client in clients))

    async def send(self, call: Call[Any]) -> HttpResponse:
        """
        Send a request and return the whole response, or raise a DifyConnectionError; a GET follows redirects within the
        connection's server.
        """
        first_url = url = f"{self.connection.base_url}{call.path}"
        for _ in range(MAX_REDIRECTS):
            # The query goes with the first request only: a redirect names its own.
            response = await self._send_once(call, url, call.params if url == first_url else None)
            target = self._redirect_target(url, response) if call.method == "GET" else None
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

    async def _send_once(self, call: Call[Any], url: str, params: Mapping[str, Any] | None) -> HttpResponse:
        # The wait for a slot is outside the timeout: that others are slow is no failure of this poll.
        async with self.slots:
            client = await self.open()
            try:
                try:
                    return await self._request(client, call, url, params)
                except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError):
                    # Most likely a kept-alive connection that the server closed just now; a new one tells.
                    return await self._request(client, call, url, params)
            except Exception as error:
                # Whatever the client calls it, and whatever the server or a proxy said to cause it.
                failure = no_response(self.connection, call.subject, url, error)
        # Outside of the handler: the client's own error, which a log would show as the cause, may quote a password.
        raise failure

    async def _request(
        self, client: aiohttp.ClientSession, call: Call[Any], url: str, params: Mapping[str, Any] | None
    ) -> HttpResponse:
        connect, total = self.connection.timeouts()
        # Elsewhere the client's own limits.
        longer: Any = {}
        if call.patience_seconds > total:
            longer = {"timeout": aiohttp.ClientTimeout(total=call.patience_seconds, sock_connect=connect)}
        if call.data is not None:
            longer |= {"data": call.data(), "headers": call.headers}
        async with client.request(
            call.method, url, params=params, json=call.body, allow_redirects=False, proxy=self.proxy, **longer
        ) as response:
            return HttpResponse.received(self.connection, url, response.status, response.headers, await response.read())

    async def read_task_id(self, workflow_run_id: str, user: str) -> str | None:
        """
        Return the task id of a run that was found in Dify's log: only its next events carry it (Dify 1.14 and later).
        ``None`` where they end before, or the server has no such route. The caller bounds the time.
        """
        client = await self.open()
        reader = EventStreamReader()
        url = f"{self.connection.base_url}/workflow/{workflow_run_id}/events"
        async with client.get(url, params={"user": user}, allow_redirects=False, proxy=self.proxy) as response:
            async for piece in response.content.iter_any():
                if not response.ok:
                    break
                for event in reader.feed(piece):
                    # In events of the past, Dify puts the run's id in place of the task's (measured).
                    if event.task_id and event.task_id != workflow_run_id:
                        return event.task_id
        return None

    async def open(self) -> aiohttp.ClientSession:
        """
        Return the client, made by the first who asks. Raises a DifyConfigurationError if the environment's or the
        connection's proxy or CA bundle can't be used.
        """
        if self.client is not None:
            return self.client
        async with self.opening:
            if self.client is None:
                # In a thread: certificates are read from disk, and the environment is asked for a proxy.
                proxy, self.tls = await asyncio.to_thread(_proxy_and_tls, self.connection)
                if proxy is not None and proxy.lower().startswith("socks"):
                    self.socks_proxy = proxy
                else:
                    self.proxy = proxy
                connect, total = self.connection.timeouts()
                # One timer for the whole response, where requests has one for each piece of it: a trigger's slot must
                # not be held by a server that sends a byte at a time.
                timeout = aiohttp.ClientTimeout(total=total, sock_connect=connect)
                self.client = self._new_client(timeout, limit=MAX_REQUESTS_AT_ONCE, keepalive_timeout=KEEPALIVE_SECONDS)
            return self.client

    async def open_for_starts(self) -> aiohttp.ClientSession:
        """
        Return the client that starts go through, over a connection each unless these are kept: if the server closed a
        kept one at this very moment, nobody could tell whether the start arrived. ``trace_request_ctx`` of a request,
        whose ``may_have_been_sent`` is set, says when it has its connection.
        """
        await self.open()
        if self.starter is None:
            trace = aiohttp.TraceConfig()
            trace.on_connection_create_end.append(_note_connection)
            trace.on_connection_reuseconn.append(_note_connection)
            # No timer for the response: a queued run is silent for as long as it is queued.
            timeout = aiohttp.ClientTimeout(total=None, connect=self.connection.timeouts()[0])
            # Who starts runs limits how many, and a run that waits for a socket would look like a queued one.
            kept = (
                {"keepalive_timeout": KEEPALIVE_SECONDS_OF_STARTS} if self.keeps_connections else {"force_close": True}
            )
            self.starter = self._new_client(timeout, [trace], limit=0, **kept)
        return self.starter

    def _new_client(
        self, timeout: aiohttp.ClientTimeout, traces: list[aiohttp.TraceConfig] | None = None, **limits: Any
    ) -> aiohttp.ClientSession:
        settings: dict[str, Any] = {"ssl": self.tls, **limits}
        connector = (
            _socks_connector(self.socks_proxy, settings) if self.socks_proxy else aiohttp.TCPConnector(**settings)
        )
        headers = CIMultiDict(HEADERS)
        # Also the key may stand here: this session is one connection's, and follows no redirect by itself.
        headers.update(self.connection.headers, Authorization=f"Bearer {self.connection.api_key}")
        return aiohttp.ClientSession(
            connector=connector,
            timeout=timeout,
            headers=headers,
            cookie_jar=aiohttp.DummyCookieJar(),
            max_line_size=MAX_HEADER,
            max_field_size=MAX_HEADER,
            trace_configs=traces,
        )


async def _note_connection(session: aiohttp.ClientSession, context: Any, params: Any) -> None:
    context.trace_request_ctx.may_have_been_sent = True


def _socks_connector(proxy: str, settings: dict[str, Any]) -> aiohttp.BaseConnector:
    from aiohttp_socks import ProxyConnector, ProxyType  # an extra of this package

    # As requests reads it, which takes a URL without a port, too.
    url = urlsplit(proxy)
    connector: aiohttp.BaseConnector = ProxyConnector(
        url.hostname or "",
        url.port or _SOCKS_PORT,
        ProxyType.SOCKS4 if url.scheme.startswith("socks4") else ProxyType.SOCKS5,
        unquote(url.username or ""),
        unquote(url.password or ""),
        # Only these two let the proxy look names up.
        rdns=url.scheme in ("socks5h", "socks4a"),
        **settings,
    )
    return connector


def _proxy_and_tls(connection: DifyConnection) -> tuple[str | None, ssl.SSLContext | bool]:
    """Return the proxy and the certificates that ``requests`` would use, so that both clients go the same way."""
    route = route_to(connection, socks_package="aiohttp_socks")
    return route.proxy, route.verify if isinstance(route.verify, bool) else load_bundle(route.verify)


T = TypeVar("T")

# A run's inputs may be megabytes, and a triggerer has many waits.
MAX_BODY_KEPT = 32_768
UPLOADS_AT_ONCE = 32
# What a request has at least: the last look at a run, after its deadline, is one.
_SHORTEST_SECONDS = 1.0

# Returns the connection's settings. It gets those whose key was refused, or `None`.
ReadConnection = Callable[[DifyConnection | None], Awaitable[DifyConnection]]


class DifyClient:
    """
    Sends requests with one app's API key, each once, and once more if the key was rotated. Used as ``async with``,
    which takes and returns its share of the session.
    """

    def __init__(self, read_connection: ReadConnection, *, keeps_connections: bool = False) -> None:
        # The connection's settings, as last read, and Dify's version, as its last response named it.
        self.connection: DifyConnection | None = None
        self.server_version: str | None = None
        # Epoch seconds at which a request ends, at the earliest after a second; None for no limit.
        self.deadline: float | None = None
        self._read_connection = read_connection
        # Of starts, for many one after another: that saves a TLS handshake each.
        self._keeps_connections = keeps_connections
        self._session: SharedSession | None = None
        self._streams: WeakSet[AsyncWorkflowRunStream] = WeakSet()
        self._last_run: tuple[str, bytes, WorkflowRun] | None = None
        self._reading = asyncio.Lock()
        # Starts whose files are uploaded at once: each has some of them in memory.
        self.uploads = asyncio.Semaphore(UPLOADS_AT_ONCE)
        # What lives as long as the client, such as the downloader of its runs' files.
        self.until_exit = AsyncExitStack()
        self.downloader: Any = None

    async def __aenter__(self) -> Self:
        """Read the connection and open the session, if no one has; a DifyConfigurationError if it can't be used."""
        try:
            await self._connect(None)
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            # The end of the event loop, which may come next, waits for no socket.
            await asyncio.gather(*(stream.wait_closed() for stream in self._streams))
        finally:
            await self.until_exit.aclose()
            await self.close()

    async def close(self) -> None:
        """Return the share of the session; the last one out closes it."""
        session, self._session = self._session, None
        if session is not None:
            await session.leave()

    @property
    def response_timeout(self) -> float:
        """Seconds for a whole response."""
        return self._opened.connection.timeouts()[1]

    @property
    def address(self) -> str:
        """Dify's version and base URL, for a line in a log; empty where the version isn't known."""
        return f"Dify {self.server_version} at {self._opened.connection.base_url}" if self.server_version else ""

    async def perform(self, call: Call[T]) -> T:
        """Send a request, and return what its response means; raises a DifyError for what is no success."""

        async def send() -> T:
            return self._parse(call, await self._send_until_deadline(call))

        return await self.with_current_key(send)

    def send_start(
        self, inputs: Mapping[str, Any], user: str, workflow_id: str | None = None, extras: StartExtras = NO_EXTRAS
    ) -> AsyncWorkflowRunStream:
        """
        Send the start of a run once, and return at once; its response is still to come. Raises a DifyConfigurationError
        if an argument can't be sent.
        """
        path, body = start_path(workflow_id), encode_start(inputs, user, extras.body)
        # A share of its own: this client may use another session meanwhile, with a key that was rotated.
        stream = AsyncWorkflowRunStream(SharedSession.join(self._opened.connection), path, body, user, extras.headers)
        self._streams.add(stream)
        return stream

    async def read_task_id(self, workflow_run_id: str, user: str, seconds: float) -> str | None:
        """Return the task id of a run, which only its next event carries; ``None`` if none came in time."""
        # Whatever goes wrong, the task's id stays unknown, and that is all.
        with suppress(Exception):
            return await asyncio.wait_for(self._opened.read_task_id(workflow_run_id, user), seconds)
        return None

    async def with_current_key(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do what may be repeated once, if Dify refuses the key and the connection has another one by now."""
        used = self.connection
        try:
            return await work()
        except DifyAuthenticationError:
            if not await self._connection_has_changed(used):
                raise
        return await work()

    @property
    def _opened(self) -> SharedSession:
        assert self._session is not None, "The client was not opened."  # noqa: S101
        return self._session

    async def _connection_has_changed(self, refused: DifyConnection | None) -> bool:
        async with self._reading:
            if self.connection == refused:
                await self._connect(refused)
        return self.connection != refused

    async def _connect(self, refused: DifyConnection | None) -> None:
        """Read the connection, and take a share of the session that goes with it."""
        connection = await self._read_connection(refused)
        connection.check_key()
        if self._session is None or connection != self.connection:
            # Exchanged in one step: other tasks of this client send meanwhile.
            earlier, self._session = self._session, SharedSession.join(connection)
            self._session.keeps_connections |= self._keeps_connections
            self.connection = connection
            if earlier is not None:
                await earlier.leave()
            await self._opened.open()

    async def _send_until_deadline(self, call: Call[Any]) -> HttpResponse:
        # A share of its own, as a start's: another task may have a rotated key read meanwhile.
        session = SharedSession.join(self._opened.connection)
        seconds = None if self.deadline is None else max(_SHORTEST_SECONDS, self.deadline - time.time())
        try:
            return await asyncio.wait_for(session.send(call), seconds)
        except asyncio.TimeoutError:
            error = TimeoutError(f"no whole response within {seconds:.3g} seconds")
        finally:
            await session.leave()
        raise no_response(session.connection, call.subject, f"{session.connection.base_url}{call.path}", error)

    def _parse(self, call: Call[T], response: HttpResponse) -> T:
        self.server_version = response.server_version or self.server_version
        # While a run goes on, poll after poll brings the same bytes, and parsing them is the dearest part of a poll.
        last = self._last_run
        if last is not None and response.status_code == 200 and last[:2] == (call.path, response.body):
            return last[2]  # type: ignore[return-value]
        result = call.parse(response)
        if isinstance(result, WorkflowRun):
            keep = len(response.body) <= MAX_BODY_KEPT
            self._last_run = (call.path, response.body, result) if keep else None
        return result
