"""What is known of a start and its run, whichever client sent it, and what it means if it goes wrong. Pure."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import ERROR, STARTED, EventStreamReader, WorkflowEvent
from airflow_provider_dify.api.http_response import HttpResponse, no_response, reason_of, without_key
from airflow_provider_dify.api.responses import error_from_start, error_from_start_event
from airflow_provider_dify.api.text import one_line
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunUncertain

MAX_EVENTS = 1_000
MAX_BYTES = 16 * 1024 * 1024


class Backlog:
    """The events of a stream that its reader has not taken yet, as the one who reads the socket knows them."""

    def __init__(self) -> None:
        # Of each event, or of the first one of several that came together.
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._begun = 0

    def add(self, size: int, events: int) -> None:
        """
        Note the next piece of the stream.

        :param size: its bytes.
        :param events: how many events it completed.
        """
        self._begun += size
        if events:
            self._sizes.extend([self._begun, *[0] * (events - 1)])
            self._bytes += self._begun
            self._begun = 0

    def is_full(self, waiting: int) -> bool:
        """
        Return whether the reader has to catch up first.

        :param waiting: how many events it has not taken yet.
        """
        while len(self._sizes) > waiting:
            self._bytes -= self._sizes.popleft()
        return waiting >= MAX_EVENTS or self._bytes >= MAX_BYTES


_SUBJECT = "the start of a workflow run"
START_HEADERS = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
# Seconds for which a stream is read on after an error: the end of its run may follow (measured: within milliseconds).
SECONDS_AFTER_ERROR = 2.0
# What a stream brings: that an event stream has begun (None), a response that is none, an event, or why no more comes.
StreamItem = HttpResponse | WorkflowEvent | Exception | None


class StartedRun:
    """
    What is known of a start and its run, whichever client sent it.

    :param connection: the connection that the start goes to.
    :param url: where it goes.
    :param user: the ``user`` in its body, for messages.
    :ivar workflow_run_id: the run's UUID; empty until Dify names it.
    :ivar task_id: the UUID that :meth:`DifyHook.stop_workflow_task` takes; empty until then.
    :ivar app_id: the UUID of the run's app; ``None`` where the server doesn't say.
    :ivar server_version: Dify's version; ``None`` until it responds.
    :ivar is_accepted: whether an event stream has begun, which from Dify 1.13 on does not say that there is a run yet.
    :ivar error_event: the ``error`` that came before the run had a name; ``None`` where none did.
    """

    def __init__(self, connection: DifyConnection, url: str, user: str) -> None:
        self._connection = connection
        self._url = url
        self._user = user
        self.workflow_run_id = ""
        self.task_id = ""
        self.app_id: str | None = None
        self.server_version: str | None = None
        self.is_accepted = False
        self.error_event: WorkflowEvent | None = None
        # An event that named the run and says more than that, for the next who asks.
        self._kept: WorkflowEvent | None = None

    @property
    def is_named(self) -> bool:
        """Whether Dify has named the run; until then it is queued, or was rejected without a word."""
        return bool(self.workflow_run_id)

    @property
    def has_ended(self) -> bool:
        """Whether the event that named the run was its last one."""
        return self._kept is not None and self._kept.is_ending

    def next_event(self, seconds: float) -> Any:
        """
        Return the run's next event; on an event loop, to be awaited.

        :param seconds: how long to wait for it.
        :return: the event; ``None`` if there was none, which says nothing about the run.
        :raises DifyError: if Dify rejected the start; a :class:`DifyConnectionError` only if nothing was started.
        :raises DifyWorkflowRunUncertain: if the stream ended before Dify named the run, which may have been started.
        :raises DifyConnectionError: if the stream broke off after that; the run goes on.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Hang up; the run goes on."""
        raise NotImplementedError

    @staticmethod
    def _is_stream(status_code: int, headers: Mapping[str, str]) -> bool:
        """Return whether a response begins an event stream."""
        return status_code < 400 and headers.get("Content-Type", "").startswith("text/event-stream")

    def _receive(self, status_code: int, headers: Mapping[str, str], body: bytes) -> StreamItem:
        """
        Return what a response brings, or the beginning of one.

        :param body: the whole body; empty for a stream, whose events come later.
        """
        received = HttpResponse.received(self._connection, self._url, status_code, headers, body)
        self.server_version = received.server_version
        return None if self._is_stream(status_code, headers) else received

    def _new_reader(self) -> EventStreamReader:
        return EventStreamReader(lambda data: without_key(data, self._connection.api_key))

    def _take(self, item: StreamItem, may_have_been_sent: bool) -> WorkflowEvent | None:
        """
        Note what came next, and return or raise what it means to :meth:`next_event`.

        :param item: what came.
        :param may_have_been_sent: whether any byte of the request may have gone out.
        """
        if item is None:
            self.is_accepted = True
            return None
        if isinstance(item, HttpResponse):
            raise self._rejection(item)
        if isinstance(item, Exception):
            raise self._error(item, may_have_been_sent)
        return self._note(item)

    def _note(self, item: WorkflowEvent) -> WorkflowEvent:
        if self.is_named:
            return item
        if item.workflow_run_id and item.task_id:
            # Whichever event it is: with Dify's events on Redis streams, some runs have no workflow_started (measured).
            self.workflow_run_id = item.workflow_run_id
            self.task_id = item.task_id
            self.app_id = item.app_id
            self._kept = item if item.name != STARTED else None
        elif item.name == ERROR:
            self.error_event = item
        elif item.is_ending:
            raise self._uncertain(f"the stream begins with the event {item.name!r}: {one_line(item.data, 300)}")
        return item

    def _take_kept(self) -> WorkflowEvent | None:
        """Return the event that named the run, if it is to be read again."""
        kept, self._kept = self._kept, None
        return kept

    def _error(self, error: Exception, may_have_been_sent: bool) -> DifyError:
        if self.is_named:
            return self.broken(reason_of(error, self._connection.secrets))
        if not self.is_accepted and not may_have_been_sent:
            return no_response(self._connection, _SUBJECT, self._url, error)
        return self._uncertain(reason_of(error, self._connection.secrets))

    def _rejection(self, response: HttpResponse) -> DifyError:
        error = error_from_start(response)
        # Only what a server says before it starts anything is sure to have started nothing.
        is_sure = 300 <= response.status_code < 500
        if isinstance(error, DifyConnectionError) and not is_sure:
            return self._uncertain(str(error))
        return error

    def rejection(self) -> DifyError | None:
        """Return what Dify's error from before the run had a name means; ``None`` where there was none."""
        if self.error_event is None:
            return None
        return error_from_start_event(self.error_event.data, self.server_version)

    def broken(self, reason: str) -> DifyConnectionError:
        return DifyConnectionError(
            f"{reason}: the events of workflow run {self.workflow_run_id} broke off at {self._url}. The run goes on.",
            server_version=self.server_version,
        )

    def unnamed(self, seconds: float) -> DifyWorkflowRunUncertain:
        return DifyWorkflowRunUncertain(
            f"Dify did not name the run of user {self._user!r} within {seconds:g} seconds: it is queued, and "
            "may run later. Look for the user in the app's log in Dify's console.",
            user=self._user,
        )

    def _uncertain(self, reason: str) -> DifyWorkflowRunUncertain:
        return DifyWorkflowRunUncertain(
            f"{reason}: no run id came back from {self._url}, so Dify may or may not have started a workflow run "
            "for user "
            f"{self._user!r}. It was not asked again, so as not to pay twice. Look for the user in the app's log in "
            "Dify's console.",
            user=self._user,
        )


@dataclass(frozen=True)
class NextEvent:
    """The next event of a run's stream, waited for so many seconds at most."""

    stream: StartedRun
    seconds: float


def wait_until_accepted(stream: StartedRun, seconds: float) -> Generator[NextEvent, WorkflowEvent | None, bool]:
    """
    Wait for the beginning of the response.

    :param stream: the start.
    :param seconds: how long.
    :return: whether an event stream has begun.
    """
    if not stream.is_accepted:
        yield NextEvent(stream, seconds)
    return stream.is_accepted


def wait_until_named(stream: StartedRun, seconds: float) -> Generator[NextEvent, WorkflowEvent | None, bool]:
    """
    Wait until Dify names the run, or says that there will be none.

    :param stream: the start.
    :param seconds: how long.
    :return: whether the run has a name; else it is queued, perhaps.
    :raises DifyError: what Dify's error from before a name means.
    """
    until = time.monotonic() + seconds
    while not stream.is_named and (left := until - time.monotonic()) > 0:
        yield NextEvent(stream, left)
        if not stream.is_named and stream.error_event is not None:
            yield from read_after_error(stream)
            if not stream.is_named and (error := stream.rejection()) is not None:
                raise error
    return stream.is_named


def read_after_error(stream: StartedRun) -> Generator[NextEvent, WorkflowEvent | None, None]:
    """Read on for a moment after an error that named no run: it is not always the end of the stream."""
    until = time.monotonic() + SECONDS_AFTER_ERROR
    with suppress(DifyWorkflowRunUncertain):
        while not stream.is_named and (left := until - time.monotonic()) > 0:
            yield NextEvent(stream, left)


def require_name(stream: StartedRun, seconds: float) -> Generator[NextEvent, WorkflowEvent | None, None]:
    """
    Wait until Dify names the run, and hang up if it doesn't.

    :param stream: the start.
    :param seconds: how long.
    :raises DifyWorkflowRunUncertain: if Dify named no run in time.
    """
    try:
        if not (yield from wait_until_named(stream, seconds)):
            raise stream.unnamed(seconds)
    except BaseException:
        stream.close()
        raise


def next_required_event(
    stream: StartedRun, seconds: float
) -> Generator[NextEvent, WorkflowEvent | None, WorkflowEvent]:
    """
    Wait for the next event of a run that is named.

    :param stream: the run's events.
    :param seconds: how long.
    :raises DifyConnectionError: if the stream breaks off, or is silent for longer.
    """
    event = yield NextEvent(stream, seconds)
    if event is None:
        raise stream.broken(f"no event within {seconds:g} seconds")
    return event
