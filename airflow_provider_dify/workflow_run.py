"""
The one module that knows what Dify's wire looks like, and what a workflow run's state means for a task.

Servers differ from their documentation and from each other: up to 1.12 ``outputs`` is JSON text and an unknown run is
a 200 full of nulls; later ``outputs`` is an object and an unknown run a 404. All of that ends here.
"""

from __future__ import annotations

import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import urlsplit

from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyRequestError,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
)

if TYPE_CHECKING:
    from pendulum import DateTime

# The longest user that Dify takes; a longer one is a 500.
MAX_USER_LENGTH = 255
APP_MODES_WITH_WORKFLOW_RUNS = frozenset({"workflow", "advanced-chat"})

# 425 is the one other 4xx that HTTP itself defines as "the same request may succeed later".
_PASSING_STATUS_CODES = frozenset({408, 425, 429})
# How much of an unexpected answer an error quotes: enough to recognise a login page, never more than a line.
_EXCERPT_LENGTH = 120


class WorkflowRunStatus(str, Enum):
    """The states of a workflow run that Dify's servers are known to answer."""

    RUNNING = "running"
    PAUSED = "paused"
    SCHEDULED = "scheduled"
    SUCCEEDED = "succeeded"
    PARTIAL_SUCCEEDED = "partial-succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


_WAITING_STATUSES = frozenset({WorkflowRunStatus.RUNNING, WorkflowRunStatus.PAUSED, WorkflowRunStatus.SCHEDULED})


@dataclass(frozen=True)
class WorkflowRun:
    """
    A workflow run as ``GET /workflows/run/{workflow_run_id}`` tells it, the same for every server generation.

    :param id: the run's UUID.
    :param workflow_id: the UUID of the workflow version that ran.
    :param status: a :class:`WorkflowRunStatus`, or the text itself where the server knows one that we don't.
    :param inputs: what the run was started with, Dify's ``sys.*`` entries included.
    :param outputs: what the end node gave; ``None`` where the server said null, ``{}`` where it has none yet.
    :param error: Dify's own words on why the run failed or was stopped.
    :param total_steps: nodes run; 0 while the run is running.
    :param total_tokens: language model tokens used.
    :param created_at: when the run was created, in UTC.
    :param finished_at: when it ended, in UTC; ``None`` until then.
    :param elapsed_time: seconds it took; 0.0 while it is running.
    """

    id: str
    workflow_id: str | None
    status: WorkflowRunStatus | str
    inputs: dict[str, Any] | None
    outputs: dict[str, Any] | None
    error: str | None
    total_steps: int | None
    total_tokens: int | None
    created_at: DateTime | None
    finished_at: DateTime | None
    elapsed_time: float | None

    @property
    def app_id(self) -> str | None:
        """The UUID of the app that the run is of; ``None`` where the server doesn't tell."""
        return app_id_of(self.inputs)

    def without_payload(self) -> dict[str, Any]:
        """
        Give everything but inputs and outputs, as values that any XCom backend takes.

        :return: ``id, workflow_id, status, error, total_steps, total_tokens, created_at, finished_at, elapsed_time``;
            times as ISO 8601 text.
        """
        return {
            "id": self.id,
            "workflow_id": self.workflow_id,
            "status": str(self.status),
            "error": self.error,
            "total_steps": self.total_steps,
            "total_tokens": self.total_tokens,
            "created_at": self.created_at.isoformat() if self.created_at else None,
            "finished_at": self.finished_at.isoformat() if self.finished_at else None,
            "elapsed_time": self.elapsed_time,
        }

    def xcoms(self, multiple_outputs: bool) -> dict[str, Any]:
        """
        Give what the XComs of a task that waited on this run are.

        :param multiple_outputs: whether each output is an XCom of its own.
        :return: values by key; the return value is the outputs, ``{}`` where there are none.
        """
        outputs = self.outputs or {}
        return {
            "workflow_run": self.without_payload(),
            **(outputs if multiple_outputs else {}),
            "return_value": outputs,
        }


@dataclass(frozen=True)
class AppInfo:
    """
    The app that an API key belongs to, as ``GET /info`` tells it.

    :param name: the app's name in Dify's console.
    :param mode: ``workflow``, ``advanced-chat``, ``chat``, ...; ``None`` on servers that don't tell.
    """

    name: str
    mode: str | None

    @property
    def has_workflow_runs(self) -> bool:
        """Whether run details can be read with this app's key; assumed where the server doesn't tell."""
        return self.mode is None or self.mode in APP_MODES_WITH_WORKFLOW_RUNS


@dataclass(frozen=True)
class LoggedWorkflowRun:
    """
    A workflow run as a row of ``GET /workflows/logs`` tells it: without inputs and outputs.

    :param workflow_run_id: the run's UUID.
    :param status: as in :class:`WorkflowRun`.
    :param user: the ``user`` that started it through the API; ``None`` for runs started otherwise.
    :param error: Dify's own words on why it failed.
    :param total_steps: nodes run.
    :param total_tokens: language model tokens used.
    :param created_at: when it was created, in UTC.
    :param finished_at: when it ended, in UTC.
    :param elapsed_time: seconds it took.
    """

    workflow_run_id: str
    status: WorkflowRunStatus | str
    user: str | None
    error: str | None
    total_steps: int | None
    total_tokens: int | None
    created_at: DateTime | None
    finished_at: DateTime | None
    elapsed_time: float | None


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


def app_id_of(inputs: object) -> str | None:
    """
    Find a run's app in what the run was started with.

    :param inputs: the run's inputs, Dify's ``sys.*`` entries included.
    :return: the app's UUID; ``None`` where they don't tell it.
    """
    try:
        return canonical_uuid("sys.app_id", inputs.get("sys.app_id") if isinstance(inputs, dict) else None)
    except DifyConfigurationError:
        return None


def canonical_workflow_run_id(workflow_run_id: object) -> str:
    """
    Check a workflow run id before any request is made with it.

    Dify answers an id that is no UUID with a 500, and an empty one with an HTML 404, which both look like passing
    trouble of the server.

    :param workflow_run_id: any spelling that ``uuid.UUID`` takes.
    :return: the id in lower case with hyphens.
    :raises DifyConfigurationError: if it is anything else; the message shows what it was.
    """
    return canonical_uuid("workflow_run_id", workflow_run_id)


def canonical_uuid(name: str, value: object) -> str:
    """
    Check an id that becomes part of a route.

    :param name: the argument, for the message.
    :param value: any spelling that ``uuid.UUID`` takes.
    :return: the id in lower case with hyphens.
    :raises DifyConfigurationError: if it is anything else; the message shows what it was.
    """
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, str):
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    shown = repr(value)
    if len(shown) > _EXCERPT_LENGTH:
        shown = shown[:_EXCERPT_LENGTH] + "…"
    raise DifyConfigurationError(
        f"{name} must be the UUID that Dify gave it, but it is {shown} ({type(value).__name__}). If it is a template "
        "or comes from an upstream task, check what that task returned."
    )


def workflow_run_subject(workflow_run_id: str) -> str:
    """Give the words for a run in the middle of a message."""
    return f"workflow run {workflow_run_id}"


def workflow_run_path(workflow_run_id: str) -> str:
    """Give the route of a run's detail, below the base URL."""
    return f"/workflows/run/{workflow_run_id}"


def stop_path(task_id: str) -> str:
    """Give the route that stops a task, below the base URL."""
    return f"/workflows/tasks/{canonical_uuid('task_id', task_id)}/stop"


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


class Outcome(str, Enum):
    """What a workflow run's state means for the task that waits on it."""

    WAIT = "wait"
    DONE = "done"
    FAILED = "failed"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Verdict:
    """
    What one look at a workflow run means for the task that waits on it.

    :param outcome: keep waiting, done, or one of the two ways to fail.
    :param reason: a sentence for the log or the exception; quotes run, status, Dify's error, seconds and steps.
    :param is_warning: whether the reason deserves a warning although the task goes on.
    """

    outcome: Outcome
    reason: str
    is_warning: bool = False

    def raise_if_failed(self, run: WorkflowRun) -> None:
        """
        Raise what the verdict means.

        :param run: the run that was judged; the exception carries it.
        :raises DifyWorkflowRunFailed: if the run failed.
        :raises DifyWorkflowRunTimeout: if it is overdue.
        """
        if self.outcome is Outcome.FAILED:
            raise DifyWorkflowRunFailed(self.reason, run=run)
        if self.outcome is Outcome.TIMED_OUT:
            raise DifyWorkflowRunTimeout(self.reason, run=run)


def judge(
    run: WorkflowRun,
    *,
    now: datetime,
    fail_on_partial_success: bool = False,
    run_timeout: float | None = None,
) -> Verdict:
    """
    Say what a workflow run's state means for a task that waits on it. Pure: the same answer for the same arguments.

    :param run: the run as Dify told it.
    :param now: the present, aware.
    :param fail_on_partial_success: whether ``partial-succeeded`` is a failure; else a success with a warning.
    :param run_timeout: seconds after the run's own ``created_at`` from which a run that is not over counts as failed.
    :return: the verdict.
    """
    if run.status == WorkflowRunStatus.SUCCEEDED:
        return Verdict(Outcome.DONE, f"Dify workflow run {run.id} succeeded{_facts(run)}.")
    if run.status == WorkflowRunStatus.PARTIAL_SUCCEEDED:
        reason = (
            f"Dify workflow run {run.id} is partial-succeeded{_facts(run)}: at least one of its nodes failed and the "
            "node's error handling (default value or fail branch) took over."
        )
        if fail_on_partial_success:
            return Verdict(Outcome.FAILED, f"{reason} fail_on_partial_success is set.")
        return Verdict(Outcome.DONE, reason, is_warning=True)
    if run.status in (WorkflowRunStatus.FAILED, WorkflowRunStatus.STOPPED):
        verb = "failed" if run.status == WorkflowRunStatus.FAILED else "was stopped"
        error = f": {run.error}" if run.error else "; Dify gave no error text."
        return Verdict(Outcome.FAILED, f"Dify workflow run {run.id} {verb} (status {run.status}){_facts(run)}{error}")
    if run.status not in _WAITING_STATUSES and run.finished_at is not None:
        error = f": {run.error}" if run.error else "."
        return Verdict(
            Outcome.FAILED,
            f"Dify workflow run {run.id} finished with the status {str(run.status)!r}, which this version of "
            f"airflow-provider-dify does not know{_facts(run)}{error}",
        )
    if run_timeout is not None and run.created_at is not None:
        age = (now - run.created_at).total_seconds()
        if age > run_timeout:
            cause = (
                "It waits for a person at a Human Input node."
                if run.status == WorkflowRunStatus.PAUSED
                else "Such a record is usually orphaned: the server that ran it was killed, or it was stopped and Dify "
                "did not write that down. Look at the run in Dify's log and start a new one."
            )
            return Verdict(
                Outcome.TIMED_OUT,
                f"Dify workflow run {run.id} is still {run.status} {age:.0f} seconds after it was created "
                f"(run_timeout is {run_timeout:g} seconds). {cause}",
            )
    return Verdict(Outcome.WAIT, f"Dify workflow run {run.id} is {run.status}.")


def _facts(run: WorkflowRun) -> str:
    took = [] if run.elapsed_time is None else [f"after {run.elapsed_time:g} seconds"]
    steps = [] if run.total_steps is None else [f"{run.total_steps} step{'' if run.total_steps == 1 else 's'}"]
    return f" {' and '.join(took + steps)}" if took or steps else ""


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
