"""A start that was sent, the run once Dify names it, and the run's events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any

import requests
from urllib3.exceptions import NewConnectionError

from airflow_provider_dify.api.events import STARTED, EventStreamReader, WorkflowEvent
from airflow_provider_dify.api.http_response import HttpResponse, without_key
from airflow_provider_dify.api.session import DifySession
from airflow_provider_dify.api.started_run import StartedRun
from airflow_provider_dify.closing import Closing
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyError

if TYPE_CHECKING:
    from requests.models import Response


class WorkflowRunStream(StartedRun, Closing):
    """
    A start that was sent, the run once Dify names it, and the run's events.

    The request and its response are read in a thread, so that a caller waits for the next event as long as it likes and
    no longer, whatever the server does. The run goes on without its client.

    :param session: a session of its own: on a kept-alive connection that the server has just closed, nobody could tell
        whether the request arrived.
    :param url: where to send the start.
    :param body: the JSON body.
    :param user: the ``user`` in the body, for messages.
    """

    def __init__(self, connection: DifyConnection, session: DifySession, url: str, body: bytes, user: str) -> None:
        super().__init__(connection, url, user)
        self._session = session
        self._response: Response | None = None
        # A response or its events in turn, then why there are no more.
        self._items: SimpleQueue[HttpResponse | WorkflowEvent | Exception | None] = SimpleQueue()
        self._end: Exception | None = None
        threading.Thread(target=self._read, args=(body,), name="dify-start", daemon=True).start()

    def wait_until_accepted(self, seconds: float) -> bool:
        """
        Wait for the beginning of the response.

        :param seconds: how long.
        :return: whether an event stream has begun, which from Dify 1.13 on does not say that there is a run yet.
        :raises DifyError: if Dify rejected the start; a :class:`DifyConnectionError` only if nothing was started.
        :raises DifyWorkflowRunUncertain: if a run may have been started all the same.
        """
        if not self._accepted:
            item = self._next_item(seconds)
            if isinstance(item, HttpResponse):
                self.close()
                raise self._rejection(item)
            self._accepted = item is not None
        return self._accepted

    def next_event(self, seconds: float) -> WorkflowEvent | None:
        """
        Return the run's next event.

        :param seconds: how long to wait for it.
        :return: the event; ``None`` if there was none, which says nothing about the run.
        :raises DifyWorkflowRunUncertain: if the stream ended before Dify named the run.
        :raises DifyConnectionError: if the stream broke off after that; the run goes on.
        """
        item = self._next_item(seconds)
        if not isinstance(item, WorkflowEvent):
            return None
        try:
            return self._note(item)
        except DifyError:
            self.close()
            raise

    def wait_until_named(self, seconds: float) -> WorkflowEvent | None:
        """
        Wait until Dify names the run.

        :param seconds: how long.
        :return: the event ``workflow_started``; ``None`` if it did not come in time: the run is queued, perhaps.
        :raises DifyError: as :meth:`wait_until_accepted` and :meth:`next_event` do.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not self._accepted:
                self.wait_until_accepted(left)
                continue
            event = self.next_event(left)
            if event is not None and event.name == STARTED:
                return event
        return None

    def require_name(self, seconds: float) -> None:
        """
        Wait until Dify names the run, and hang up if it doesn't.

        :param seconds: how long.
        :raises DifyWorkflowRunUncertain: if Dify named no run in time.
        :raises DifyError: as :meth:`wait_until_named` does.
        """
        try:
            if self.wait_until_named(seconds) is None:
                raise self._unnamed(seconds)
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[WorkflowEvent]:
        """
        Iterate over the events after ``workflow_started``, up to the one that ends the stream.

        :raises DifyConnectionError: if the stream breaks off, or is silent for longer than the timeout.
        """
        timeout = self._connection.timeouts()[1]
        while True:
            event = self.next_event(timeout)
            if event is None:
                raise self._broken(f"no event within {timeout:g} seconds")
            yield event
            if event.is_ending:
                return

    def close(self) -> None:
        """Hang up; the run goes on."""
        # First the sockets: a thread that reads one would not notice that it was closed.
        self._session.abort()
        if self._response is not None:
            self._response.close()
        self._session.close()

    def _next_item(self, seconds: float) -> HttpResponse | WorkflowEvent | bool | None:
        """Return what came next: a response that is no stream, ``True`` for the beginning of a stream, or an event."""
        if self._end is None:
            try:
                item = self._items.get(timeout=max(0.0, seconds))
            except Empty:
                return None
            if item is None:
                return True
            if not isinstance(item, Exception):
                return item
            self._end = item
        self.close()
        raise self._error(self._end, may_have_been_sent=self._may_have_been_sent(self._end))

    def _read(self, body: bytes) -> None:
        """Send the start and read what comes back, in a thread of its own."""
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
        connect, _ = self._connection.timeouts()
        try:
            # No timeout for a piece of the response: a queued run is silent for as long as it is queued.
            response = self._session.post(
                self._url, data=body, headers=headers, stream=True, allow_redirects=False, timeout=(connect, None)
            )
            self._response = response
            is_stream = response.ok and response.headers.get("Content-Type", "").startswith("text/event-stream")
            body = b"" if is_stream else response.content
            received = HttpResponse.received(self._connection, self._url, response.status_code, response.headers, body)
            self.server_version = received.server_version
            if not is_stream:
                self._items.put(received)
                return
            self._items.put(None)
            self._read_events(response)
        except Exception as error:
            self._items.put(error)

    def _read_events(self, response: Response) -> None:
        reader = EventStreamReader(lambda data: without_key(data, self._connection.api_key))
        # What is there, and not the next 8 KB, which a response without chunks would wait for.
        while piece := response.raw.read1(65536):
            for event in reader.feed(piece):
                self._items.put(event)
        raise EOFError("the stream ended before the run did")

    def _may_have_been_sent(self, error: Exception) -> bool:
        """
        Return whether any byte of the request may have gone out.

        The kind of an error doesn't tell: one of TLS or of a proxy comes before the request or after it.
        """
        if self._session.was_sent is not None:
            return self._session.was_sent
        reason: Any = getattr(error.args[0], "reason", None) if error.args else None
        return not isinstance(error, (requests.ConnectTimeout, ValueError)) and not isinstance(
            reason, NewConnectionError
        )
