"""
The requests of Dify's Service API: routes, queries and bodies, and what the whole response means.

A client sends them: :mod:`airflow_provider_dify.api.session` on a worker, :mod:`airflow_provider_dify.api.client` on an
event loop.
"""

from __future__ import annotations

import contextlib
import json
import mimetypes
import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import IO, Any, Generic, Protocol, TypeVar

from airflow_provider_dify.api import responses
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.models import AppInfo, LogRow, WorkflowRun
from airflow_provider_dify.api.text import one_line
from airflow_provider_dify.exceptions import DifyConfigurationError

INFO = "/info"
PARAMETERS = "/parameters"
LOGS = "/workflows/logs"
UPLOAD = "/files/upload"

# The longest user that Dify takes; a longer one is a 500.
MAX_USER_LENGTH = 255


def run_path(workflow_run_id: str) -> str:
    """Return the path of a run's detail."""
    return f"/workflows/run/{workflow_run_id}"


def start_path(workflow_id: str | None) -> str:
    """Return the path that starts a run of the current version, or of the one with this id."""
    return "/workflows/run" if workflow_id is None else f"/workflows/{parse_uuid('workflow_id', workflow_id)}/run"


def stop_path(task_id: str) -> str:
    """Return the path that stops a task."""
    return f"/workflows/tasks/{parse_uuid('task_id', task_id)}/stop"


def events_path(workflow_run_id: str) -> str:
    """Return the path of a run's events (Dify 1.14 and later)."""
    return f"/workflow/{workflow_run_id}/events"


def parse_workflow_run_id(workflow_run_id: object) -> str:
    """
    Parse a workflow run id before any request is made with it. Dify returns a 500 for an id that is no UUID, and an
    HTML 404 for an empty one, which both look like a fault of the server that may pass.
    """
    return parse_uuid("workflow_run_id", workflow_run_id)


def parse_uuid(name: str, value: object) -> str:
    """Return an id that becomes part of a path in lower case with hyphens, from any spelling of a UUID."""
    if isinstance(value, (str, uuid.UUID)):
        with contextlib.suppress(ValueError):
            return str(uuid.UUID(str(value)))
    raise DifyConfigurationError(
        f"{name} must be the UUID that Dify returned, but it is {one_line(repr(value), 120)} ({type(value).__name__}). "
        "If it is a template or comes from an upstream task, check what that task returned."
    )


def check_user(user: object) -> None:
    """Check that the ``user`` of a request is text of 1 to 255 characters."""
    if not isinstance(user, str) or not user or len(user) > MAX_USER_LENGTH:
        raise DifyConfigurationError(
            f"user must be text of 1 to {MAX_USER_LENGTH} characters, but it is {one_line(repr(user), 300)}."
        )


# As Dify checks them (1.16 and 1.17): it ignores another id, and rejects a start with another session.
_TRACE_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")
_TRACE_SESSION_ID = re.compile(r"[\x20-\x7e]{1,200}")


def trace_headers(
    trace_id: str | None = None, trace_session_id: str | None = None, traceparent: str | None = None
) -> dict[str, str]:
    """Return the headers of a start that say which trace its run is in; ``{}`` for none."""
    if trace_id is not None and not (isinstance(trace_id, str) and _TRACE_ID.fullmatch(trace_id)):
        raise DifyConfigurationError(
            f"trace_id must be text of 1 to 128 letters, digits, - and _, but it is {one_line(repr(trace_id), 200)}."
        )
    session = trace_session_id.strip() if isinstance(trace_session_id, str) else trace_session_id
    if session is not None and not (isinstance(session, str) and _TRACE_SESSION_ID.fullmatch(session)):
        raise DifyConfigurationError(
            f"trace_session_id must be text of 1 to 200 ASCII characters, but it is {one_line(repr(session), 300)}."
        )
    headers = {"X-Trace-Id": trace_id, "X-Trace-Session-Id": session, "traceparent": traceparent}
    return {name: value for name, value in headers.items() if value is not None}


def plain_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return inputs as JSON has them: sequences of any kind become lists, such as the outputs of a mapped task.

    Airflow 2 lets only the task's own thread read those. Raises a DifyConfigurationError for what is no JSON.
    """
    plain: dict[str, Any] = json.loads(_json_of(inputs))
    return plain


def encode_start(inputs: Mapping[str, Any], user: str) -> bytes:
    """Return the JSON body of a start in streaming mode; raises a DifyConfigurationError for what can't be sent."""
    check_user(user)
    return f'{{"inputs": {_json_of(inputs)}, "user": {json.dumps(user)}, "response_mode": "streaming"}}'.encode()


def _json_of(inputs: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(inputs), allow_nan=False, default=_as_list)
    except (TypeError, ValueError, RecursionError) as error:
        raise DifyConfigurationError(f"inputs must be an object of JSON values: {error}") from error


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


@contextlib.contextmanager
def open_upload(
    file: str | os.PathLike[str] | IO[bytes], file_name: str | None, mime_type: str | None
) -> Iterator[tuple[str, IO[bytes], str]]:
    """
    Return name, open file and type of a file to upload, as ``requests`` takes them. A file that is open already stays
    open. Without a type, which is guessed from the name by default, Dify refuses the upload (415).
    """
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
        except OSError as error:
            raise DifyConfigurationError(f"The file to upload cannot be read: {error}") from error
        name = file_name or os.path.basename(str(getattr(opened, "name", "file")))
        yield name, opened, mime_type or mimetypes.guess_type(name)[0] or "application/octet-stream"


T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request; ``parse`` returns what the whole response means, or raises."""

    method: str
    path: str
    # What is requested, in the middle of a message.
    subject: str
    parse: Callable[[HttpResponse], T]
    params: Mapping[str, Any] | None = None
    body: Mapping[str, Any] | None = None
    # The server gets so long for the response at least, whatever the connection says.
    patience_seconds: float = 0.0


class Client(Protocol):
    """What sends requests on an event loop, for one app."""

    async def perform(self, call: Call[T]) -> T:
        """Send a request, and return what its response means."""


def run_detail(workflow_run_id: str) -> Call[WorkflowRun]:
    """Return the request for a run's detail; the id is parsed already."""
    path, subject = run_path(workflow_run_id), f"workflow run {workflow_run_id}"
    return Call("GET", path, subject, lambda response: responses.parse_workflow_run(response, workflow_run_id))


def app_info() -> Call[AppInfo]:
    """Return the request for the app's name and mode."""
    return Call("GET", INFO, "the app's name", responses.parse_app_info)


def parameters() -> Call[dict[str, Any]]:
    """Return the request for the app's input form."""
    return Call("GET", PARAMETERS, "the app's input form", responses.parse_parameters)


def stop_task(task_id: str, user: str) -> Call[None]:
    """Return the request to stop a task."""
    check_user(user)
    path = stop_path(task_id)
    return Call("POST", path, f"the stop of task {task_id}", responses.parse_stop, body={"user": user})


def logged_runs(
    *,
    user: str | None = None,
    status: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    page: int = 1,
    limit: int = 20,
    patience_seconds: float = 0.0,
) -> Call[list[LogRow]]:
    """Return the request for a page of the app's log, newest runs first."""
    params = {
        "created_by_end_user_session_id": user,
        "status": status,
        "created_at__after": created_after.isoformat() if created_after else None,
        "created_at__before": created_before.isoformat() if created_before else None,
        "page": page,
        "limit": limit,
    }
    given = {name: value for name, value in params.items() if value is not None}
    parse, subject = responses.parse_log, responses.LOG_SUBJECT
    return Call("GET", LOGS, subject, parse, given, patience_seconds=patience_seconds)
