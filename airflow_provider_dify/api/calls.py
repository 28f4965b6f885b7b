# SPDX-License-Identifier: Apache-2.0
"""
The requests of Dify's Service API, as data (routes, queries, bodies), and what the whole response means: a model or an
exception.

Servers differ from their documentation and from each other: up to 1.12 ``outputs`` is JSON text and an unknown run is a
200 full of nulls, 1.13.0 returns a 500 for it and later ones a 404. All of that ends here. Each parser raises a
DifyAuthenticationError on Dify's 401 and 403, a DifyRequestError on its other rejections, and a DifyConnectionError on
what may pass and on a response that is not Dify's, whatever it says.
"""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import urlsplit

from airflow_provider_dify.api.http_response import Fields, HttpResponse
from airflow_provider_dify.api.models import (
    REASON_LENGTH,
    AppInfo,
    LoggedWorkflowRun,
    LogRow,
    RowWithoutRun,
    WorkflowRun,
    one_line,
    status_of,
)
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.files import copied, files_in, with_files_as

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


def plain_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """
    Return inputs as JSON has them: sequences of any kind become lists, such as the outputs of a mapped task.

    Airflow 2 lets only the task's own thread read those. Raises a DifyConfigurationError for what is no JSON.
    """
    plain: dict[str, Any] = json.loads(_json_of(with_files_as(inputs, lambda file: None)))
    # Files of its own, at which only this task looks.
    return {**plain, **{name: value for name, value in copied(inputs).items() if files_in({name: value})}}


# What the provider sends itself with each start.
_OWN_FIELDS = ("inputs", "user", "response_mode")


def encode_start(inputs: Mapping[str, Any], user: str, extra_body: Mapping[str, Any] | None = None) -> bytes:
    """
    Return the JSON body of a start in streaming mode, with further fields of one's own.

    Raises a DifyConfigurationError for what can't be sent.
    """
    check_user(user)
    if own := [name for name in _OWN_FIELDS if name in (extra_body or {})]:
        raise DifyConfigurationError(f"extra_body must not have {own[0]!r}, which the provider sends itself.")
    extra = f", {_json_of(extra_body, 'extra_body')[1:-1]}" if extra_body else ""
    own_fields = f'"inputs": {_json_of(inputs)}, "user": {json.dumps(user)}, "response_mode": "streaming"'
    return f"{{{own_fields}{extra}}}".encode()


def _json_of(inputs: Mapping[str, Any], name: str = "inputs") -> str:
    try:
        return json.dumps(dict(inputs), allow_nan=False, default=_as_list)
    except (TypeError, ValueError, RecursionError) as error:
        raise DifyConfigurationError(f"{name} must be an object of JSON values: {error}") from error


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


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
    # What makes a body that streams, on an event loop, and its headers.
    data: Callable[[], Any] | None = None
    headers: Mapping[str, str] | None = None
    # The server gets so long for the response at least, whatever the connection says.
    patience_seconds: float = 0.0


class Client(Protocol):
    """What sends requests on an event loop, for one app."""

    async def perform(self, call: Call[T]) -> T:
        """Send a request, and return what its response means."""


def run_detail(workflow_run_id: str) -> Call[WorkflowRun]:
    """Return the request for a run's detail; the id is parsed already."""
    path, subject = run_path(workflow_run_id), f"workflow run {workflow_run_id}"
    return Call("GET", path, subject, lambda response: parse_workflow_run(response, workflow_run_id))


def app_info() -> Call[AppInfo]:
    """Return the request for the app's name and mode."""
    return Call("GET", INFO, "the app's name", parse_app_info)


def parameters() -> Call[dict[str, Any]]:
    """Return the request for the app's input form."""
    return Call("GET", PARAMETERS, "the app's input form", parse_parameters)


def stop_task(task_id: str, user: str) -> Call[None]:
    """Return the request to stop a task."""
    check_user(user)
    path = stop_path(task_id)
    return Call("POST", path, f"the stop of task {task_id}", parse_stop, body={"user": user})


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
    return Call("GET", LOGS, LOG_SUBJECT, parse_log, given, patience_seconds=patience_seconds)


# 425 is the one other 4xx that HTTP itself defines as "the same request may succeed later".
_PASSING_STATUS_CODES = frozenset({408, 425, 429})
LOG_SUBJECT = "the app's log of workflow runs"


def parse_workflow_run(response: HttpResponse, workflow_run_id: str) -> WorkflowRun:
    """Parse ``GET /workflows/run/{workflow_run_id}``; an unknown run raises a DifyWorkflowRunNotFound."""
    subject = f"workflow run {workflow_run_id}"
    is_404 = response.status_code == 404 and response.is_of_dify
    # One with HTML is a wrong base URL.
    if is_404 and (not response.body.strip() or _is_dify_error(response.json_object())):
        raise not_found(response, workflow_run_id)
    data = _parse_object(response, subject)
    if "id" not in data or "status" not in data:
        raise _not_dify(response, subject, "JSON without the fields 'id' and 'status'")
    if data["id"] is None:
        raise not_found(response, workflow_run_id)
    fields = Fields(response, subject, data)
    return WorkflowRun(
        id=fields.required_id("id"),
        workflow_id=fields.text("workflow_id"),
        inputs=fields.json_object("inputs"),
        outputs=fields.json_object("outputs"),
        **_parse_state(fields),
    )


def _parse_state(fields: Fields) -> dict[str, Any]:
    """Parse what a run's detail and its row in the log say alike."""
    error = fields.text("error")
    return {
        "status": status_of(fields.status(), error),
        "error": error,
        "total_steps": fields.integer("total_steps"),
        "total_tokens": fields.integer("total_tokens"),
        "created_at": fields.time("created_at"),
        "finished_at": fields.time("finished_at"),
        "elapsed_time": fields.number("elapsed_time"),
    }


def parse_app_info(response: HttpResponse) -> AppInfo:
    """Parse ``GET /info``: the app's name and mode."""
    subject = "the app's name"
    data = _parse_object(response, subject)
    if "name" not in data:
        raise _not_dify(response, subject, "JSON without the field 'name'")
    fields = Fields(response, subject, data)
    return AppInfo(name=fields.required_text("name"), mode=fields.text("mode"))


def parse_parameters(response: HttpResponse) -> dict[str, Any]:
    """Parse ``GET /parameters``: the whole object, whose ``user_input_form`` describes the workflow's inputs."""
    return _parse_object(response, "the app's input form")


def parse_log(response: HttpResponse) -> list[LogRow]:
    """Parse ``GET /workflows/logs``: the rows of the page, newest first."""
    rows = _parse_object(response, LOG_SUBJECT).get("data")
    if not isinstance(rows, list):
        raise _not_dify(response, LOG_SUBJECT, "JSON without the list 'data'")
    return [_parse_log_row(response, row) for row in rows]


def _parse_log_row(response: HttpResponse, row: Any) -> LogRow:
    if not isinstance(row, dict) or not isinstance(row.get("workflow_run", ""), (dict, type(None))):
        raise _not_dify(response, LOG_SUBJECT, "a list with a row that has no 'workflow_run'")
    of_row = Fields(response, LOG_SUBJECT, row)
    end_user = row.get("created_by_end_user")
    user = Fields(response, LOG_SUBJECT, end_user).text("session_id") if isinstance(end_user, dict) else None
    logged_at = of_row.time("created_at")
    if row["workflow_run"] is None:
        return RowWithoutRun(of_row.required_id("id"), user, logged_at)
    fields = Fields(response, LOG_SUBJECT, row["workflow_run"])
    return LoggedWorkflowRun(
        workflow_run_id=fields.required_id("id"),
        user=user,
        exceptions_count=fields.integer("exceptions_count"),
        triggered_from=fields.text("triggered_from"),
        version=fields.text("version"),
        logged_at=logged_at,
        **_parse_state(fields),
    )


def parse_uploaded_file_id(response: HttpResponse) -> str:
    """Parse ``POST /files/upload``: the file's id, for ``upload_file_id`` in a run's inputs."""
    subject = "the uploaded file"
    return Fields(response, subject, _parse_object(response, subject)).required_id("id")


def parse_stop(response: HttpResponse) -> None:
    """Parse ``POST /workflows/tasks/{task_id}/stop``; a success promises nothing."""
    _parse_object(response, "the stop of a workflow run")


def error_from_start(response: HttpResponse) -> DifyError:
    """
    Return what a response without an event stream means to a start: what a parser raises, but a DifyInputsRejected for
    inputs, and a DifyRequestError for the plan's quota, which doesn't pass by waiting minutes.
    """
    subject = "the start of a workflow run"
    try:
        _parse_object(response, subject)
    except DifyConnectionError as error:
        if error.status_code == 429 and error.code == "rate_limit_error":
            return DifyRequestError(
                f"{error.message or 'The quota is used up'}: Dify refused to start a workflow run with "
                f"{response.connection_name}, because the quota of the plan or of the model's provider is used up "
                "(HTTP 429 rate_limit_error). Waiting does not help: look at the quota in Dify's console.",
                **_facts(response, error.code, error.message),
            )
        return error
    except DifyRequestError as error:
        if error.status_code == 400 and error.code == "invalid_param" and "input" in (error.message or ""):
            return DifyInputsRejected(str(error), **_facts(response, error.code, error.message))
        return error
    return _not_dify(response, subject, "no event stream")


def error_from_start_event(data: dict[str, Any], server_version: str | None) -> DifyError:
    """
    Return what an ``error`` event means to a start whose run has no name: Dify's own word that it started nothing.
    Measured on 1.16.1 and 1.17: ``code``, ``message`` and ``status`` are those of a response. What is neither
    ``invalid_param`` nor another 4xx is a DifyWorkflowRunFailed, which a retry may repeat.
    """
    code, text, status = (data.get(name) for name in ("code", "message", "status"))
    message = one_line(text or code or "Dify gave no error text").rstrip(".")
    facts: dict[str, Any] = {"code": code, "dify_message": message, "server_version": server_version}
    is_4xx = isinstance(status, int) and 400 <= status < 500
    if "Too many requests" not in message:
        if code == "invalid_param":
            return DifyInputsRejected(
                f"{message}. Dify rejected the inputs and started no workflow run. Check the task's inputs.", **facts
            )
        if is_4xx:
            return DifyRequestError(f"{message}. Dify rejected the start of a workflow run ({code}).", **facts)
    return DifyWorkflowRunFailed(
        f"{message}. Dify failed to start a workflow run, and said so before the run had an id. A retry starts another."
    )


def not_found(response: HttpResponse, workflow_run_id: str) -> DifyWorkflowRunNotFound:
    """Return the error for a run that Dify doesn't know."""
    return DifyWorkflowRunNotFound(
        f"Dify does not know workflow run {workflow_run_id} (HTTP {response.status_code} from {response.url}). Check "
        f"the id, and that {response.connection_name} holds an API key of the app that made the run: Dify shows a "
        "run to its own app only. If the server writes runs late, set not_found_grace.",
        workflow_run_id=workflow_run_id,
    )


def _is_dify_error(data: dict[str, Any] | None) -> bool:
    return data is not None and ("code" in data or "message" in data)


def _parse_object(response: HttpResponse, subject: str) -> dict[str, Any]:
    """Return a successful response's JSON object, or raise what any other response means."""
    data = response.json_object()
    status_code = response.status_code
    if 200 <= status_code < 300:
        if data is None:
            raise _not_dify(response, subject, "no JSON object")
        return data

    code = message = None
    if data is not None and _is_dify_error(data):
        code, message = (
            None if data.get(key) is None else response.shown(data[key], REASON_LENGTH) for key in ("code", "message")
        )
    cause = f"{message or code} (HTTP {status_code}{f' {code}' if code else ''})" if code or message else ""
    cause = cause or response.excerpt()
    facts = _facts(response, code, message)
    # The one 400 that passes: Dify's own limit on active requests (documented as a 429).
    is_overloaded = status_code == 429 or (status_code == 400 and "Too many requests" in (message or ""))
    if status_code >= 500 or status_code in _PASSING_STATUS_CODES or is_overloaded:
        raise DifyConnectionError(
            f"{cause}: Dify could not respond for {subject} at {response.url}. This may pass.",
            retry_after=response.retry_after(),
            is_overloaded=is_overloaded,
            **facts,
        )
    if 400 <= status_code < 500 and status_code != 413 and not response.is_of_dify:
        # Its word says nothing about the key or the run. 413 is about the request, whoever says it.
        raise DifyConnectionError(
            f"{cause}: something in front of Dify (a gateway, a proxy or a login page) responded for {subject} at "
            f"{response.url}, not Dify itself. This may pass; if it doesn't, let the task's requests through there.",
            **facts,
        )
    if status_code in (401, 403):
        raise DifyAuthenticationError(
            f"{cause}: Dify refused the API key of {response.connection_name} when asked for {subject}. Check the "
            "connection's password: it must be an API key of the app, and the app's API access must be on.",
            **facts,
        )
    if 400 <= status_code < 500 and response.is_of_dify and (code or message):
        hint = ""
        if code == "not_workflow_app":
            hint = " The API key belongs to an app of another kind: use the key of the workflow app that made the run."
        raise DifyRequestError(
            f"{cause}: Dify rejected the request for {subject} with {response.connection_name}.{hint}", **facts
        )
    if status_code == 413:
        # Of a server in front of Dify, whatever it says; the same request would get the same response.
        raise DifyRequestError(
            f"{cause}: the request for {subject} at {response.url} is too large for a server in front of Dify. Send "
            "less, or raise that server's limit (nginx: client_max_body_size).",
            **facts,
        )
    location = response.header("Location")
    what = "no response of Dify's"
    if 300 <= status_code < 400 and location:
        what = (
            f"a redirect to {response.shown(location, REASON_LENGTH)}, where the API key is not sent; if that is where "
            "Dify is, make it the connection's host"
        )
    raise _not_dify(response, subject, what)


def _facts(response: HttpResponse, code: str | None, message: str | None) -> dict[str, Any]:
    return {
        "status_code": response.status_code,
        "code": code,
        "dify_message": message,
        "server_version": response.server_version,
    }


def _not_dify(response: HttpResponse, subject: str, what: str) -> DifyConnectionError:
    has_v1 = "v1" in urlsplit(response.url).path.split("/")
    hint = "" if has_v1 else " Dify's API usually lives under /v1: is that missing from the base URL?"
    return DifyConnectionError(
        f"The response for {subject} at {response.url} is {what} ({response.excerpt()}). Check the host of "
        f"{response.connection_name}.{hint}",
        **_facts(response, None, None),
    )
