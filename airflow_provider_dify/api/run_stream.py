# SPDX-License-Identifier: Apache-2.0
"""A start that was sent, the run once Dify names it, and the run's events."""

from __future__ import annotations

import asyncio
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from airflow_provider_dify.api.calls import error_from_start, error_from_start_event, parse_workflow_run_id
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import ERROR, STARTED, EventStreamReader, WorkflowEvent
from airflow_provider_dify.api.http_response import HttpResponse, no_response, reason_of, without_key
from airflow_provider_dify.api.models import one_line, redact
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyWorkflowRunUncertain,
)

if TYPE_CHECKING:
    from types import TracebackType

    import aiohttp


MAX_EVENTS = 1_000
MAX_BYTES = 16 * 1024 * 1024

_SUBJECT = "the start of a workflow run"
_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
# For so long a stream is read on after an error: the end of its run may follow (measured: within milliseconds).
SECONDS_AFTER_ERROR = 2.0


@dataclass(frozen=True)
class StartExtras:
    """What goes along with a start beside its inputs: headers, and further fields of its body."""

    headers: Mapping[str, str] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None


NO_EXTRAS = StartExtras()
# As Dify checks them (1.16 and 1.17): it ignores another id, and rejects a start with another session.
_TRACE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TRACE_SESSION_ID = re.compile(r"[\x20-\x7e]{1,200}")


def start_extras(
    trace_id: str | None = None,
    trace_session_id: str | None = None,
    extra_body: Mapping[str, Any] | None = None,
    traceparent: str | None = None,
) -> StartExtras:
    """Return what says which trace a run is in, and its further fields; checks the trace and its session."""
    if trace_id is not None and not (isinstance(trace_id, str) and _TRACE_ID.fullmatch(trace_id)):
        raise DifyConfigurationError(
            f"trace_id must be text of 1 to 128 letters, digits, - and _, but it is {one_line(repr(trace_id), 200)}."
        )
    session = trace_session_id.strip() if isinstance(trace_session_id, str) else trace_session_id
    if session is not None and not (isinstance(session, str) and _TRACE_SESSION_ID.fullmatch(session)):
        shown = one_line(repr(session), 300)
        raise DifyConfigurationError(f"trace_session_id must be text of 1 to 200 ASCII characters, but it is {shown}.")
    headers = {"X-Trace-Id": trace_id, "X-Trace-Session-Id": session, "traceparent": traceparent}
    return StartExtras({name: value for name, value in headers.items() if value is not None}, extra_body)


# What a stream brings: that an event stream has begun (None), a response that is none, an event, or why no more comes.
StreamItem = HttpResponse | WorkflowEvent | Exception | None


class Session(Protocol):
    """What a start goes through: a share of a connection's session, which the stream returns at its end."""

    connection: DifyConnection
    proxy: str | None

    async def open_for_starts(self) -> aiohttp.ClientSession:
        """Return the client that starts go through."""

    async def leave(self) -> None:
        """Return the share."""


class AsyncWorkflowRunStream:
    """
    A start that was sent on an event loop, the run once Dify names it, and the run's events.

    The run continues without its client. ``async with`` hangs up at its end; ``async for`` iterates over the events.

    :param session: what the start goes through: a share that is the stream's own.
    :param path: where to send the start.
    :param body: the JSON body.
    :param user: the ``user`` in the body, for messages.
    :param headers: further headers of the start.
    :ivar workflow_run_id: the run's UUID; empty until Dify names it, by an event or in the response's header.
    :ivar task_id: the UUID that :meth:`DifyHook.stop_workflow_task` takes; empty until then.
    :ivar app_id: the UUID of the run's app; ``None`` where the server doesn't say.
    :ivar server_version: Dify's version; ``None`` until it responds.
    :ivar is_accepted: whether an event stream has begun, which from Dify 1.13 on does not say that there is a run yet.
    :ivar error_event: the ``error`` that came before the run had a name; ``None`` where none did.
    """

    def __init__(
        self, session: Session, path: str, body: bytes, user: str, headers: Mapping[str, str] = NO_EXTRAS.headers
    ) -> None:
        self._connection: DifyConnection = session.connection
        self._url = f"{session.connection.base_url}{path}"
        self._user = user
        self.workflow_run_id = ""
        self.task_id = ""
        self.app_id: str | None = None
        self.server_version: str | None = None
        self.is_accepted = False
        self.error_event: WorkflowEvent | None = None
        # An event that named the run and says more than that, for the next who asks.
        self._kept: WorkflowEvent | None = None
        # Set by the session once the start has a connection, from when on its bytes may go out.
        self.may_have_been_sent = False
        # What the stream brought and nobody has taken yet, each with its size in bytes.
        self._items: deque[tuple[StreamItem, int]] = deque()
        self._waiting_bytes = 0
        self._end: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._was_taken = asyncio.Event()
        self._is_closed = False
        self._session = session
        self._reader = asyncio.get_running_loop().create_task(self._read(body, {**_HEADERS, **headers}))

    @property
    def is_named(self) -> bool:
        """Whether an event has named run and task; until then the run is queued, or was rejected without a word."""
        return bool(self.task_id)

    @property
    def has_ended(self) -> bool:
        """Whether the event that named the run was its last one."""
        return self._kept is not None and self._kept.is_ending

    async def next_event(self, seconds: float) -> WorkflowEvent | None:
        """
        Return the run's next event.

        :param seconds: how long to wait for it.
        :return: the event; ``None`` if there was none, which says nothing about the run.
        :raises DifyError: if Dify rejected the start; a :class:`DifyConnectionError` only if nothing was started.
        :raises DifyWorkflowRunUncertain: if the stream ended before Dify named the run, which may have been started.
        :raises DifyConnectionError: if the stream broke off after that; the run continues.
        """
        if self._kept is not None:
            kept, self._kept = self._kept, None
            return kept
        if not self._items and self._end is None:
            await self._wait_for_item(seconds)
        if self._end is None and not self._items:
            return None
        item, size_bytes = (self._end, 0) if self._end is not None else self._items.popleft()
        self._waiting_bytes -= size_bytes
        self._was_taken.set()
        if isinstance(item, Exception):
            self._end = item
        try:
            return self._take(item)
        except DifyError:
            self.close()
            raise

    async def wait_until_accepted(self, seconds: float) -> bool:
        """
        Wait for the beginning of the response.

        :param seconds: how long.
        :return: whether an event stream has begun.
        :raises DifyError: as :meth:`next_event` does.
        """
        if not self.is_accepted:
            await self.next_event(seconds)
        return self.is_accepted

    async def wait_until_named(self, seconds: float) -> bool:
        """
        Wait until Dify names the run, or says that there will be none.

        :param seconds: how long.
        :return: whether the run has a name; else it is queued, perhaps.
        :raises DifyError: what Dify's error from before a name means; any other, as :meth:`next_event` does.
        """
        until = time.monotonic() + seconds
        while not self.is_named and (left := until - time.monotonic()) > 0:
            await self.next_event(left)
            if self.error_event is not None and not self.is_named:
                await self.read_after_error()
                if not self.is_named and (error := self.rejection()) is not None:
                    raise error
        return self.is_named

    async def require_name(self, seconds: float) -> None:
        """
        Wait until Dify names the run, and hang up if it doesn't.

        :param seconds: how long.
        :raises DifyWorkflowRunUncertain: if Dify named no run in time.
        :raises DifyError: as :meth:`wait_until_named` does.
        """
        try:
            if not await self.wait_until_named(seconds) and not self.workflow_run_id:
                raise DifyWorkflowRunUncertain(
                    f"Dify did not name the run of user {self._user!r} within {seconds:g} seconds: it is queued, and "
                    "may run later. Look for the user in the app's log in Dify's console.",
                    user=self._user,
                )
        except BaseException:
            self.close()
            raise

    async def read_after_error(self) -> None:
        """Read on for a moment after an error that named no run: it is not always the end of the stream."""
        until = time.monotonic() + SECONDS_AFTER_ERROR
        with suppress(DifyWorkflowRunUncertain):
            while not self.is_named and (left := until - time.monotonic()) > 0:
                await self.next_event(left)

    async def next_required_event(self) -> WorkflowEvent:
        """
        Return the next event of a run that is named.

        :raises DifyConnectionError: if the stream breaks off, or is silent for longer than the timeout.
        """
        seconds = self._connection.timeouts()[1]
        event = await self.next_event(seconds)
        if event is None:
            raise self._broken(f"no event within {seconds:g} seconds")
        return event

    async def __aiter__(self) -> AsyncIterator[WorkflowEvent]:
        """
        Iterate over the events after ``workflow_started``, up to the one that ends the stream.

        :raises DifyConnectionError: if the stream breaks off, or is silent for longer than the timeout.
        """
        while True:
            event = await self.next_required_event()
            yield event
            if event.is_ending:
                return

    def rejection(self) -> DifyError | None:
        """Return what Dify's error from before the run had a name means; ``None`` where there was none."""
        if self.error_event is None:
            return None
        # What it quotes may be what a gateway was sent.
        secrets = self._connection.secrets
        data = {name: redact(v, secrets) if isinstance(v, str) else v for name, v in self.error_event.data.items()}
        return error_from_start_event(data, self.server_version)

    async def __aenter__(self) -> AsyncWorkflowRunStream:
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
        await self.wait_closed()

    def close(self) -> None:
        """Hang up; the run continues."""
        self._is_closed = True
        self._reader.cancel()

    async def wait_closed(self) -> None:
        """Wait until a stream that was closed has let go of its socket; return at once from one that was not."""
        if self._is_closed:
            await asyncio.gather(self._reader, return_exceptions=True)

    # --- what is read in the background

    async def _read(self, body: bytes, headers: Mapping[str, str]) -> None:
        """Send the start and read what comes back, in a task of its own."""
        try:
            client = await self._session.open_for_starts()
            async with client.post(
                self._url,
                data=body,
                headers=headers,
                allow_redirects=False,
                proxy=self._session.proxy,
                trace_request_ctx=self,
            ) as response:
                is_stream = _is_stream(response.status, response.headers)
                # The events of a stream come later.
                whole = b"" if is_stream else await response.read()
                received = HttpResponse.received(self._connection, self._url, response.status, response.headers, whole)
                self.server_version = received.server_version
                with suppress(DifyConfigurationError):
                    # A branch of Dify names the run here, before there is a record of it.
                    self.workflow_run_id = parse_workflow_run_id(received.header("X-Workflow-Run-ID"))
                self._put(None if is_stream else received)
                if is_stream:
                    await self._read_events(response)
        except Exception as error:
            self._put(error)
        finally:
            await self._session.leave()

    async def _read_events(self, response: aiohttp.ClientResponse) -> None:
        reader = EventStreamReader(lambda data: without_key(data, self._connection.api_key))
        size = 0
        async for piece in response.content.iter_any():
            size += len(piece)
            for event in reader.feed(piece):
                # The first of several that came together counts for them all.
                self._put(event, size)
                size = 0
            # Who takes the events has to catch up first.
            while len(self._items) >= MAX_EVENTS or self._waiting_bytes >= MAX_BYTES:
                self._was_taken.clear()
                await self._was_taken.wait()
        raise EOFError("the stream ended before the run did")

    def _put(self, item: StreamItem, size_bytes: int = 0) -> None:
        self._items.append((item, size_bytes))
        self._waiting_bytes += size_bytes
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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

    # --- what it means

    def _take(self, item: StreamItem) -> WorkflowEvent | None:
        """Note what came next, and return or raise what it means to :meth:`next_event`."""
        if item is None:
            self.is_accepted = True
            return None
        if isinstance(item, HttpResponse):
            raise self._error_from_response(item)
        if isinstance(item, Exception):
            raise self._error_from_end(item)
        return self._note(item)

    def _note(self, event: WorkflowEvent) -> WorkflowEvent:
        if self.is_named:
            return event
        if event.workflow_run_id and event.task_id:
            # Whichever event it is: with Dify's events on Redis streams, some runs have no workflow_started (measured).
            self.workflow_run_id = event.workflow_run_id
            self.task_id = event.task_id
            self.app_id = event.app_id
            self._kept = event if event.name != STARTED else None
        elif event.name == ERROR:
            self.error_event = event
        elif event.is_ending:
            raise self._uncertain(f"the stream begins with the event {event.name!r}: {one_line(event.data, 300)}")
        return event

    def _error_from_end(self, error: Exception) -> DifyError:
        reason = reason_of(error, self._connection.secrets)
        if self.is_named:
            return self._broken(reason)
        if not self.is_accepted and not self.may_have_been_sent:
            return no_response(self._connection, _SUBJECT, self._url, error)
        return self._uncertain(reason)

    def _error_from_response(self, response: HttpResponse) -> DifyError:
        error = error_from_start(response)
        # Only what a server says before it starts anything is sure to have started nothing.
        is_sure = 300 <= response.status_code < 500
        if isinstance(error, DifyConnectionError) and not is_sure:
            return self._uncertain(str(error))
        return error

    def _broken(self, reason: str) -> DifyConnectionError:
        return DifyConnectionError(
            f"{reason}: the events of workflow run {self.workflow_run_id} broke off at {self._url}. The run continues.",
            server_version=self.server_version,
        )

    def _uncertain(self, reason: str) -> DifyWorkflowRunUncertain:
        named = f"no event of workflow run {self.workflow_run_id}" if self.workflow_run_id else "no run id"
        return DifyWorkflowRunUncertain(
            f"{redact(reason, self._connection.secrets)}: {named} came back from {self._url}, so Dify may or may not "
            f"have started a workflow run for user {self._user!r}. It was not asked again, so as not to pay twice. "
            "Look for the user in the app's log in Dify's console.",
            user=self._user,
        )


def _is_stream(status_code: int, headers: Mapping[str, str]) -> bool:
    """Return whether a response begins an event stream."""
    return status_code < 400 and headers.get("Content-Type", "").startswith("text/event-stream")
