"""A start that was sent on an event loop, the run once Dify names it, and the run's events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from airflow_provider_dify.api.async_session import SharedSession
from airflow_provider_dify.api.calls import run_steps_async
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import WorkflowEvent
from airflow_provider_dify.api.started_run import (
    START_HEADERS,
    Backlog,
    NextEvent,
    StartedRun,
    StreamItem,
    next_required_event,
    require_name,
)
from airflow_provider_dify.exceptions import DifyError

if TYPE_CHECKING:
    from types import TracebackType


class AsyncWorkflowRunStream(StartedRun):
    """
    A start that was sent on an event loop, the run once Dify names it, and the run's events.

    What :class:`~airflow_provider_dify.api.run_stream.WorkflowRunStream` is, awaited: ``async with`` hangs up at its
    end, and ``async for`` iterates over the events.

    :param connection: the connection's settings.
    :param url: where to send the start.
    :param body: the JSON body.
    :param user: the ``user`` in the body, for messages.
    :param keeps_connection: as for :meth:`SharedSession.open_for_starts`.
    """

    def __init__(
        self, connection: DifyConnection, url: str, body: bytes, user: str, *, keeps_connection: bool = False
    ) -> None:
        super().__init__(connection, url, user)
        self._keeps_connection = keeps_connection
        # Set by the session once the start has a connection, from when on its bytes may go out.
        self.may_have_been_sent = False
        self.is_on_kept_connection = False
        self._items: deque[StreamItem] = deque()
        self._end: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._was_taken = asyncio.Event()
        self._is_closed = False
        self._reader = asyncio.get_running_loop().create_task(self._read(body))

    async def next_event(self, seconds: float) -> WorkflowEvent | None:
        """Return the run's next event, as :meth:`StartedRun.next_event` describes."""
        if (kept := self._take_kept()) is not None:
            return kept
        if not self._items and self._end is None:
            await self._wait_for_item(seconds)
        if self._end is None and not self._items:
            return None
        item = self._end or self._items.popleft()
        self._was_taken.set()
        if isinstance(item, Exception):
            self._end = item
        try:
            return self._take(item, self.may_have_been_sent)
        except DifyError:
            self.close()
            raise

    async def require_name(self, seconds: float) -> None:
        """
        Wait until Dify names the run, and hang up if it doesn't.

        :param seconds: how long.
        :raises DifyWorkflowRunUncertain: if Dify named no run in time.
        :raises DifyError: as :meth:`next_event` does.
        """
        await run_steps_async(require_name(self, seconds), _take_step)

    async def __aiter__(self) -> AsyncIterator[WorkflowEvent]:
        """
        Iterate over the events after ``workflow_started``, up to the one that ends the stream.

        :raises DifyConnectionError: if the stream breaks off, or is silent for longer than the timeout.
        """
        timeout = self._connection.timeouts()[1]
        while True:
            event = await run_steps_async(next_required_event(self, timeout), _take_step)
            yield event
            if event.is_ending:
                return

    async def __aenter__(self) -> AsyncWorkflowRunStream:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        await self.wait_closed()

    def close(self) -> None:
        """Hang up; the run goes on."""
        self._is_closed = True
        self._reader.cancel()

    async def wait_closed(self) -> None:
        """Wait until a stream that was closed has let go of its socket; return at once from one that was not."""
        if self._is_closed:
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _wait_for_item(self, seconds: float) -> None:
        # Not asyncio.wait_for, which before Python 3.12 makes a task of each wait.
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        timer = loop.call_later(max(0.0, seconds), self._wake)
        try:
            await self._waiter
        finally:
            timer.cancel()
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _put(self, item: StreamItem) -> None:
        self._items.append(item)
        self._wake()

    async def _read(self, body: bytes) -> None:
        """Send the start and read what comes back, in a task of its own."""
        # A share of its own: the hook may open another session meanwhile, with a key that was rotated.
        session = SharedSession.join(self._connection)
        try:
            client = await session.open_for_starts(self._keeps_connection)
            async with client.post(
                self._url,
                data=body,
                headers=START_HEADERS,
                allow_redirects=False,
                proxy=session.proxy,
                trace_request_ctx=self,
            ) as response:
                is_stream = self._is_stream(response.status, response.headers)
                whole = b"" if is_stream else await response.read()
                self._put(self._receive(response.status, response.headers, whole))
                if not is_stream:
                    return
                reader, backlog = self._new_reader(), Backlog()
                async for piece in response.content.iter_any():
                    events = reader.feed(piece)
                    backlog.add(len(piece), len(events))
                    for event in events:
                        self._put(event)
                    while backlog.is_full(len(self._items)):
                        self._was_taken.clear()
                        await self._was_taken.wait()
                raise EOFError("the stream ended before the run did")
        except Exception as error:
            if self.is_on_kept_connection and self.server_version is None:
                # One that closes its connections like this may do so each time.
                session.has_lost_start = True
            self._put(error)
        finally:
            await session.leave()


async def _take_step(step: NextEvent) -> WorkflowEvent | None:
    return await step.stream.next_event(step.seconds)  # type: ignore[no-any-return]
