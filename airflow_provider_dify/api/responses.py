"""
A whole HTTP response of Dify's API in, a model or an exception out.

Servers differ from their documentation and from each other: up to 1.12 ``outputs`` is JSON text and an unknown run is
a 200 full of nulls; later ``outputs`` is an object and an unknown run a 404. All of that ends here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from airflow_provider_dify.api.routes import workflow_run_subject
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyRequestError,
    DifyWorkflowRunNotFound,
)
from airflow_provider_dify.models import AppInfo, LoggedWorkflowRun, WorkflowRun, WorkflowRunStatus

if TYPE_CHECKING:
    from pendulum import DateTime


# 425 is the one other 4xx that HTTP itself defines as "the same request may succeed later".
_PASSING_STATUS_CODES = frozenset({408, 425, 429})
# How much of an unexpected answer an error quotes: enough to recognise a login page, never more than a line.
_EXCERPT_LENGTH = 120


@dataclass(frozen=True)
class HttpAnswer:
    """
    One whole HTTP answer, whichever client received it.

    :param status_code: HTTP status.
    :param headers: the answer's headers; looked up without regard to case.
    :param body: the body's bytes, content encoding undone.
    :param url: the URL that was asked.
    :param conn_id: the Airflow connection in use, for messages.
    :param api_key: the API key in use, so that a server that echoes it can't get it into a message.
    """

    status_code: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    conn_id: str
    api_key: str = field(repr=False)

    def header(self, name: str) -> str | None:
        """Give a header's value, or ``None``."""
        wanted = name.lower()
        return next((value for key, value in self.headers.items() if key.lower() == wanted), None)

    def redact(self, text: str) -> str:
        """Give the text without the API key."""
        return text.replace(self.api_key, "***") if self.api_key else text

    def json_object(self) -> dict[str, Any] | None:
        """Give the body as a JSON object; ``None`` where it is anything else."""
        try:
            decoded = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return decoded if isinstance(decoded, dict) else None

    def excerpt(self) -> str:
        """Say in one line what came: status, content type and the first characters of the body."""
        content_type = self.redact(self.header("Content-Type") or "no content type")
        # Redacted before it is cut, so that no half of a key survives at the end.
        text = " ".join(self.redact(self.body[:65536].decode("utf-8", "replace")).split())
        if len(text) > _EXCERPT_LENGTH:
            text = text[:_EXCERPT_LENGTH] + "…"
        return f"HTTP {self.status_code}, {content_type}, {repr(text) if text else 'an empty body'}"


def answered(
    connection: DifyConnection, url: str, status_code: int, headers: Mapping[str, str], body: bytes
) -> HttpAnswer:
    """Give what a client received as an answer that can be read."""
    return HttpAnswer(status_code, headers, body, url, connection.conn_id, connection.api_key)


def unreachable(connection: DifyConnection, subject: str, url: str, error: Exception) -> DifyConnectionError:
    """Give the error for a request that got no answer, whatever its client calls that."""
    reason = str(error)
    return DifyConnectionError(
        f"Dify could not be reached for {subject} at {url}: {type(error).__name__}{f': {reason}' if reason else ''}"
    )


def read_workflow_run(answer: HttpAnswer, workflow_run_id: str) -> WorkflowRun:
    """
    Read the answer to ``GET /workflows/run/{workflow_run_id}``.

    :param answer: the whole HTTP answer.
    :param workflow_run_id: the run that was asked for, for messages.
    :return: the run.
    :raises DifyWorkflowRunNotFound: on a 404 of Dify's, or its 200 with a null id (servers up to 1.12).
    :raises DifyAuthenticationError: on 401 and 403.
    :raises DifyRequestError: on any other rejection.
    :raises DifyConnectionError: on what may pass, and on an answer that is not Dify's.
    """
    subject = workflow_run_subject(workflow_run_id)
    # A 404 without a body is some gateway's way to say the same; one with HTML is a wrong base URL.
    if answer.status_code == 404 and (not answer.body.strip() or _is_dify_error(answer.json_object())):
        _raise_not_found(answer, workflow_run_id)
    payload = _read_object(answer, subject)
    if "id" not in payload or "status" not in payload:
        _raise_not_dify(answer, subject, "JSON without the fields 'id' and 'status'")
    if payload["id"] is None:
        _raise_not_found(answer, workflow_run_id)
    fields = _Fields(answer, subject, payload)
    return WorkflowRun(
        id=fields.required_text("id"),
        workflow_id=fields.text("workflow_id"),
        status=_known_status(fields.required_text("status")),
        inputs=fields.json_object("inputs"),
        outputs=fields.json_object("outputs"),
        error=fields.text("error"),
        total_steps=fields.integer("total_steps"),
        total_tokens=fields.integer("total_tokens"),
        created_at=fields.time("created_at"),
        finished_at=fields.time("finished_at"),
        elapsed_time=fields.number("elapsed_time"),
    )


def read_app_info(answer: HttpAnswer) -> AppInfo:
    """
    Read the answer to ``GET /info``.

    :param answer: the whole HTTP answer.
    :return: the app's name and mode.
    :raises DifyError: as :func:`read_workflow_run` does.
    """
    subject = "the app's name"
    payload = _read_object(answer, subject)
    if "name" not in payload:
        _raise_not_dify(answer, subject, "JSON without the field 'name'")
    fields = _Fields(answer, subject, payload)
    return AppInfo(name=fields.required_text("name"), mode=fields.text("mode"))


def read_logged_workflow_runs(answer: HttpAnswer) -> list[LoggedWorkflowRun]:
    """
    Read the answer to ``GET /workflows/logs``.

    :param answer: the whole HTTP answer.
    :return: the rows of the page, newest first.
    :raises DifyError: as :func:`read_workflow_run` does.
    """
    subject = "the app's log of workflow runs"
    rows = _read_object(answer, subject).get("data")
    if not isinstance(rows, list):
        _raise_not_dify(answer, subject, "JSON without the list 'data'")
    runs = []
    for row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("workflow_run"), dict):
            _raise_not_dify(answer, subject, "a list with a row that has no 'workflow_run'")
        fields = _Fields(answer, subject, row["workflow_run"])
        by = row.get("created_by_end_user")
        runs.append(
            LoggedWorkflowRun(
                workflow_run_id=fields.required_text("id"),
                status=_known_status(fields.required_text("status")),
                user=_Fields(answer, subject, by).text("session_id") if isinstance(by, dict) else None,
                error=fields.text("error"),
                total_steps=fields.integer("total_steps"),
                total_tokens=fields.integer("total_tokens"),
                created_at=fields.time("created_at"),
                finished_at=fields.time("finished_at"),
                elapsed_time=fields.number("elapsed_time"),
            )
        )
    return runs


def read_uploaded_file_id(answer: HttpAnswer) -> str:
    """
    Read the answer to ``POST /files/upload``.

    :param answer: the whole HTTP answer.
    :return: the file's id, for ``upload_file_id`` in a run's inputs.
    :raises DifyError: as :func:`read_workflow_run` does.
    """
    subject = "the uploaded file"
    return _Fields(answer, subject, _read_object(answer, subject)).required_text("id")


def read_stop(answer: HttpAnswer) -> None:
    """
    Read the answer to ``POST /workflows/tasks/{task_id}/stop``; a success promises nothing.

    :param answer: the whole HTTP answer.
    :raises DifyError: as :func:`read_workflow_run` does.
    """
    _read_object(answer, "the stop of a workflow run")


def raise_rejection(answer: HttpAnswer, subject: str) -> NoReturn:
    """
    Raise what an answer without a run means to the request that asked for one.

    :param answer: the whole HTTP answer.
    :param subject: what was asked for, in the middle of a message.
    :raises DifyError: always; as :func:`read_workflow_run` does.
    """
    _read_object(answer, subject)
    _raise_not_dify(answer, subject, "no event stream")


def _known_status(text: str) -> WorkflowRunStatus | str:
    try:
        return WorkflowRunStatus(text)
    except ValueError:
        return text


def _is_dify_error(payload: dict[str, Any] | None) -> bool:
    return payload is not None and ("code" in payload or "message" in payload)


def _read_object(answer: HttpAnswer, subject: str) -> dict[str, Any]:
    """Give a successful answer's JSON object, or raise what any other answer means."""
    payload = answer.json_object()
    status_code = answer.status_code
    if 200 <= status_code < 300:
        if payload is None:
            _raise_not_dify(answer, subject, "no JSON object")
        return payload

    code = message = None
    if payload is not None and _is_dify_error(payload):
        code, message = (
            None if payload.get(key) is None else answer.redact(str(payload[key])) for key in ("code", "message")
        )
    said = f"HTTP {status_code} {code}: {message}" if code or message else answer.excerpt()
    # The one 400 that passes: Dify's own limit on concurrent requests (documented as a 429).
    overloaded = status_code == 400 and message is not None and "Too many requests" in message
    if status_code >= 500 or status_code in _PASSING_STATUS_CODES or overloaded:
        raise DifyConnectionError(
            f"Dify could not answer for {subject} at {answer.url} ({said}). This may pass.",
            status_code=status_code,
            code=code,
            dify_message=message,
            retry_after=_retry_after(answer),
        )
    if status_code in (401, 403):
        raise DifyAuthenticationError(
            f"Dify refused the API key of connection {answer.conn_id!r}, asked for {subject} ({said}). Check the "
            "connection's password: it must be an API key of the app, and the app's API access must be on.",
            status_code=status_code,
            code=code,
            dify_message=message,
        )
    if 400 <= status_code < 500 and (code or message):
        hint = (
            " The API key belongs to an app of another kind: use the key of the workflow app that made the run."
            if code == "not_workflow_app"
            else ""
        )
        raise DifyRequestError(
            f"Dify rejected the request for {subject} with connection {answer.conn_id!r} ({said}).{hint}",
            status_code=status_code,
            code=code,
            dify_message=message,
        )
    location = answer.header("Location")
    what = "no answer of Dify's"
    if 300 <= status_code < 400 and location:
        what = (
            f"a redirect to {answer.redact(location)}, where the API key is not sent; if that is where Dify is, "
            "make it the connection's host"
        )
    return _raise_not_dify(answer, subject, what)


def _raise_not_found(answer: HttpAnswer, workflow_run_id: str) -> NoReturn:
    raise DifyWorkflowRunNotFound(
        f"Dify does not know workflow run {workflow_run_id} (HTTP {answer.status_code} from {answer.url}). Check the "
        f"id, and that connection {answer.conn_id!r} holds an API key of the app that made the run: Dify shows a run "
        "to its own app only. If the server writes runs late, set not_found_grace.",
        workflow_run_id=workflow_run_id,
    )


def _raise_not_dify(answer: HttpAnswer, subject: str, what: str) -> NoReturn:
    hint = (
        ""
        if "v1" in urlsplit(answer.url).path.split("/")
        else " Dify's API usually lives under /v1: is that missing from the base URL?"
    )
    raise DifyConnectionError(
        f"The answer for {subject} at {answer.url} is {what} ({answer.excerpt()}). Check the host of connection "
        f"{answer.conn_id!r}.{hint}",
        status_code=answer.status_code,
    )


def _retry_after(answer: HttpAnswer) -> float | None:
    value = (answer.header("Retry-After") or "").strip()
    if value.isascii() and value.isdigit():
        return float(value)
    try:
        until = parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    if until.tzinfo is None:
        until = until.replace(tzinfo=timezone.utc)
    return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())


@dataclass(frozen=True)
class _Fields:
    """Typed access to an answer's fields; a field of a wrong type is an error that names it."""

    answer: HttpAnswer
    subject: str
    payload: dict[str, Any]

    def required_text(self, name: str) -> str:
        value = self.text(name)
        return self._wrong(name, "text") if value is None else value

    def text(self, name: str) -> str | None:
        value = self.payload.get(name)
        return value if value is None or isinstance(value, str) else self._wrong(name, "text or null")

    def integer(self, name: str) -> int | None:
        value = self.payload.get(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        return self._wrong(name, "a whole number or null")

    def number(self, name: str) -> float | None:
        value = self.payload.get(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return self._wrong(name, "a number or null")
        return float(value)

    def json_object(self, name: str) -> dict[str, Any] | None:
        value = self.payload.get(name)
        if isinstance(value, str):
            if not value:
                return None
            try:
                value = json.loads(value)
            except (ValueError, RecursionError):
                return self._wrong(name, "an object, the JSON text of one, or null")
        if value is None or isinstance(value, dict):
            return value
        return self._wrong(name, "an object, the JSON text of one, or null")

    def time(self, name: str) -> DateTime | None:
        import pendulum  # each poll of a task needs it, a Dag file that names the sensor does not

        value = self.payload.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, str):
                return pendulum.instance(parsedate_to_datetime(value), tz="UTC").in_timezone("UTC")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return pendulum.from_timestamp(value)
        except (ValueError, TypeError, OverflowError, OSError):
            pass
        return self._wrong(name, "epoch seconds, RFC 822 text or null")

    def _wrong(self, name: str, expected: str) -> NoReturn:
        shown = self.answer.redact(repr(self.payload[name]) if name in self.payload else "nothing")
        if len(shown) > _EXCERPT_LENGTH:
            shown = shown[:_EXCERPT_LENGTH] + "…"
        raise DifyConnectionError(
            f"The answer for {self.subject} at {self.answer.url} has a field that this provider cannot read: "
            f"{name!r} must be {expected}, but it is {shown}. Either it is not Dify that answered, or a version of "
            "Dify that this provider does not know yet.",
            status_code=self.answer.status_code,
        )
