"""One app's requests on an event loop: with the connection's present key, each once, none longer than its deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from airflow_provider_dify.api.async_session import SharedSession
from airflow_provider_dify.api.calls import Call, encode_start, start_path
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.http_response import HttpResponse, no_response
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.api.run_stream import AsyncWorkflowRunStream
from airflow_provider_dify.exceptions import DifyAuthenticationError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

T = TypeVar("T")

# A run's inputs may be megabytes, and a triggerer has many waits.
MAX_BODY_KEPT = 32_768
# What a request has at least: the last look at a run, after its deadline, is one.
_SHORTEST_SECONDS = 1.0

# Returns the connection's settings. It gets those whose key was refused, or `None`.
ReadConnection = Callable[[DifyConnection | None], Awaitable[DifyConnection]]


class DifyClient:
    """
    Sends requests with one app's API key, each once, and once more if the key was rotated.

    Used as ``async with``, which takes and returns its share of the session.

    :param read_connection: returns the connection's settings.
    :ivar connection: the connection's settings, as last read; ``None`` until then.
    :ivar server_version: Dify's version, as its last response named it; ``None`` until then.
    :ivar deadline: epoch seconds at which a request ends, at the earliest after a second; ``None`` for no limit.
    """

    def __init__(self, read_connection: ReadConnection) -> None:
        self.connection: DifyConnection | None = None
        self.server_version: str | None = None
        self.deadline: float | None = None
        self._read_connection = read_connection
        self._session: SharedSession | None = None
        self._streams: WeakSet[AsyncWorkflowRunStream] = WeakSet()
        self._last_run: tuple[str, bytes, WorkflowRun] | None = None
        self._reading = asyncio.Lock()

    async def __aenter__(self) -> Self:
        """
        Read the connection and open the session, if no one has.

        :raises DifyConfigurationError: if the connection cannot be used.
        """
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
        return f"Dify {self.server_version} at {self._opened.connection.base_url}." if self.server_version else ""

    async def perform(self, call: Call[T]) -> T:
        """Send a request, and return what its response means; raises a DifyError for what is no success."""

        async def send() -> T:
            return self._parse(call, await self._send_until_deadline(call))

        return await self.with_current_key(send)

    def send_start(
        self, inputs: Mapping[str, Any], user: str, workflow_id: str | None = None
    ) -> AsyncWorkflowRunStream:
        """
        Send the start of a run once, and return at once; its response is still to come.

        Raises a DifyConfigurationError if an argument can't be sent; nothing was sent then.
        """
        stream = AsyncWorkflowRunStream(self._opened, start_path(workflow_id), encode_start(inputs, user), user)
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
            await self.close()
            self._session = SharedSession.join(connection)
            self.connection = connection
            await self._session.open()

    async def _send_until_deadline(self, call: Call[Any]) -> HttpResponse:
        session = self._opened
        if self.deadline is None:
            return await session.send(call)
        seconds = max(_SHORTEST_SECONDS, self.deadline - time.time())
        try:
            return await asyncio.wait_for(session.send(call), seconds)
        except asyncio.TimeoutError:
            error = TimeoutError(f"no whole response within {seconds:.3g} seconds")
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
