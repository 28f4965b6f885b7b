"""A start that was sent, the run once Dify names it, and the run's events."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from queue import Empty
from typing import TYPE_CHECKING, Any

import requests
from urllib3.exceptions import NewConnectionError

from airflow_provider_dify.api.calls import run_steps
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import WorkflowEvent
from airflow_provider_dify.api.session import Closing, DifySession, Mailbox
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
    from requests.models import Response

# Seconds between two looks whether the reader of the events has caught up.
_PAUSE = 0.05


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
        self._items: Mailbox[StreamItem] = Mailbox()
        self._end: Exception | None = None
        self._is_closed = False
        threading.Thread(target=self._read, args=(body,), name="dify-start", daemon=True).start()

    def next_event(self, seconds: float) -> WorkflowEvent | None:
        """Return the run's next event, as :meth:`StartedRun.next_event` describes."""
        if (kept := self._take_kept()) is not None:
            return kept
        try:
            item = self._end or self._items.get(timeout=max(0.0, seconds))
        except Empty:
            return None
        if isinstance(item, Exception):
            self._end = item
        try:
            return self._take(item, self._may_have_been_sent())
        except DifyError:
            self.close()
            raise

    def require_name(self, seconds: float) -> None:
        """
        Wait until Dify names the run, and hang up if it doesn't.

        :param seconds: how long.
        :raises DifyWorkflowRunUncertain: if Dify named no run in time.
        :raises DifyError: as :meth:`next_event` does.
        """
        run_steps(require_name(self, seconds), _take_step)

    def __iter__(self) -> Iterator[WorkflowEvent]:
        """
        Iterate over the events after ``workflow_started``, up to the one that ends the stream.

        :raises DifyConnectionError: if the stream breaks off, or is silent for longer than the timeout.
        """
        timeout = self._connection.timeouts()[1]
        while True:
            event = run_steps(next_required_event(self, timeout), _take_step)
            yield event
            if event.is_ending:
                return

    def close(self) -> None:
        """Hang up; the run goes on."""
        self._is_closed = True
        # First the sockets: a thread that reads one would not notice that it was closed.
        self._session.abort()
        if self._response is not None:
            self._response.close()
        self._session.close()

    def _read(self, body: bytes) -> None:
        """Send the start and read what comes back, in a thread of its own."""
        connect, _ = self._connection.timeouts()
        try:
            # No timeout for a piece of the response: a queued run is silent for as long as it is queued.
            response = self._session.post(
                self._url, data=body, headers=START_HEADERS, stream=True, allow_redirects=False, timeout=(connect, None)
            )
            self._response = response
            is_stream = self._is_stream(response.status_code, response.headers)
            whole = b"" if is_stream else response.content
            self._items.put(self._receive(response.status_code, response.headers, whole))
            if is_stream:
                self._read_events(response)
        except Exception as error:
            self._items.put(error)

    def _read_events(self, response: Response) -> None:
        reader, backlog = self._new_reader(), Backlog()
        # What is there, and not the next 8 KB, which a response without chunks would wait for.
        while piece := response.raw.read1(65536):
            events = reader.feed(piece)
            backlog.add(len(piece), len(events))
            for event in events:
                self._items.put(event)
            # Without a lock, which a signal's handler in the reader's thread could wait for for ever.
            while backlog.is_full(self._items.waiting) and not self._is_closed:
                time.sleep(_PAUSE)
        raise EOFError("the stream ended before the run did")

    def _may_have_been_sent(self) -> bool:
        """
        Return whether any byte of the request may have gone out.

        The kind of an error doesn't tell: one of TLS or of a proxy comes before the request or after it.
        """
        if self._session.was_sent is not None:
            return self._session.was_sent
        error = self._end
        reason: Any = getattr(error.args[0], "reason", None) if error is not None and error.args else None
        return not isinstance(error, (requests.ConnectTimeout, ValueError)) and not isinstance(
            reason, NewConnectionError
        )


def _take_step(step: NextEvent) -> WorkflowEvent | None:
    return step.stream.next_event(step.seconds)  # type: ignore[no-any-return]
