"""A workflow run that was just started, and its events."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NoReturn

import requests
from urllib3.exceptions import NewConnectionError

from airflow_provider_dify.api.events import PING, STARTED, EventStreamReader, WorkflowEvent
from airflow_provider_dify.api.responses import answered, raise_rejection, unreachable
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyConnectionError, DifyWorkflowRunUncertain

if TYPE_CHECKING:
    from types import TracebackType

    from requests.models import Response


class WorkflowRunStream:
    """
    A workflow run that was just started, and the events that Dify tells of it.

    Iterating gives the events after ``workflow_started`` up to the one that ends the stream. A stream that breaks, or
    that is silent for longer than the timeout, is a :class:`airflow_provider_dify.exceptions.DifyConnectionError`; the
    run goes on all the same. Made by :meth:`DifyHook.start_workflow_run`.

    :ivar workflow_run_id: the run's UUID.
    :ivar task_id: the UUID that :meth:`DifyHook.stop_workflow_task` takes.
    :ivar app_id: the UUID of the run's app; ``None`` where the server doesn't tell.
    """

    def __init__(self, connection: DifyConnection, session: requests.Session, url: str, body: bytes, user: str) -> None:
        self._connection = connection
        self._session = session
        self._url = url
        self._user = user
        self.workflow_run_id = ""
        self.task_id = ""
        self.app_id: str | None = None
        self._response = self._post(body)
        self._events = self._read()
        self._find_start()

    def __iter__(self) -> Iterator[WorkflowEvent]:
        try:
            for event in self._events:
                yield event
                if event.is_ending:
                    return
        except _Broken as broken:
            raise DifyConnectionError(
                f"The events of workflow run {self.workflow_run_id} broke off at {self._url} "
                f"({type(broken.reason).__name__}: {broken.reason}). The run goes on."
            ) from broken.reason

    def __enter__(self) -> WorkflowRunStream:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the run goes on."""
        self._response.close()
        self._session.close()

    def _post(self, body: bytes) -> Response:
        subject = "the start of a workflow run"
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "Accept-Encoding": "identity"}
        try:
            response = self._session.post(self._url, data=body, headers=headers, stream=True, allow_redirects=False)
            if response.ok and response.headers.get("Content-Type", "").startswith("text/event-stream"):
                return response
            answer = answered(self._connection, self._url, response.status_code, response.headers, response.content)
        except requests.RequestException as error:
            if _was_never_sent(error):
                raise unreachable(self._connection, subject, self._url, error) from error
            self._raise_uncertain(f"{type(error).__name__}: {error}", error)
        try:
            raise_rejection(answer, subject)
        except DifyConnectionError as error:
            # Only what a server says before it starts anything is sure to have started nothing.
            if answer.status_code < 200 or 300 <= answer.status_code < 500:
                raise
            self._raise_uncertain(str(error), error)

    def _read(self) -> Iterator[WorkflowEvent]:
        reader = EventStreamReader()
        try:
            for piece in self._response.iter_content(8192):
                yield from reader.feed(piece)
        except (requests.RequestException, ValueError) as error:
            raise _Broken(error) from error
        raise _Broken(EOFError("the stream ended before the run did"))

    def _find_start(self) -> None:
        try:
            first = next(event for event in self._events if event.name != PING)
        except _Broken as broken:
            self.close()
            self._raise_uncertain(f"{type(broken.reason).__name__}: {broken.reason}", broken.reason)
        if first.name != STARTED or not first.workflow_run_id or not first.task_id:
            self.close()
            self._raise_uncertain(f"the stream begins with the event {first.name!r}: {first.data!r:.300}", None)
        self.workflow_run_id = first.workflow_run_id
        self.task_id = first.task_id
        self.app_id = first.app_id

    def _raise_uncertain(self, reason: str, cause: Exception | None) -> NoReturn:
        raise DifyWorkflowRunUncertain(
            f"Dify may or may not have started a workflow run for user {self._user!r} at {self._url}: no run id came "
            f"back ({reason}). It was not asked again, so as not to pay twice. Look for the user in the app's log in "
            "Dify's console.",
            user=self._user,
        ) from cause


class _Broken(Exception):
    """A stream that gave out, and why."""

    def __init__(self, reason: Exception) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _was_never_sent(error: requests.RequestException) -> bool:
    """Say whether a request failed before any of it can have reached the server."""
    if isinstance(error, (requests.ConnectTimeout, requests.exceptions.SSLError, requests.exceptions.ProxyError)):
        return True
    reason = getattr(error.args[0], "reason", None) if error.args else None
    return isinstance(error, (requests.exceptions.InvalidURL,)) or isinstance(reason, NewConnectionError)
