# SPDX-License-Identifier: Apache-2.0
"""What Dify's API says, as frozen data, the same for every server version; and how its text may stand in a message."""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from pendulum import DateTime


APP_MODES_WITH_WORKFLOW_RUNS = frozenset({"workflow", "advanced-chat"})


class WorkflowRunStatus(str, Enum):
    """The states of a workflow run that Dify's servers are known to return."""

    RUNNING = "running"
    PAUSED = "paused"
    SCHEDULED = "scheduled"
    SUCCEEDED = "succeeded"
    PARTIAL_SUCCEEDED = "partial-succeeded"
    FAILED = "failed"
    STOPPED = "stopped"

    def __str__(self) -> str:
        return self.value


WAITING_STATUSES = frozenset({WorkflowRunStatus.RUNNING, WorkflowRunStatus.PAUSED, WorkflowRunStatus.SCHEDULED})
ENDED_STATUSES = frozenset(WorkflowRunStatus) - WAITING_STATUSES
GOOD_STATUSES = frozenset({WorkflowRunStatus.SUCCEEDED, WorkflowRunStatus.PARTIAL_SUCCEEDED})
BAD_STATUSES = ENDED_STATUSES - GOOD_STATUSES


# Seconds for which a row of the log may wait for its run's record, where Dify lets workers write the records.
RECORD_DELAY = 300.0
# How Dify says that somebody stopped a run whose status is `failed`, which a stop left behind on 1.9 (reported). A run
# whose status is `stopped` was stopped whatever its text, of which there are three.
_STOP_REQUESTED = "requested stop"


def status_of(status: WorkflowRunStatus | str, error: str | None) -> WorkflowRunStatus | str:
    """Return what a status means, with Dify's words on it: ``stopped`` for a run that failed as it was stopped."""
    is_stop = status == WorkflowRunStatus.FAILED and _STOP_REQUESTED in (error or "").lower()
    return WorkflowRunStatus.STOPPED if is_stop else status


def is_over(status: WorkflowRunStatus | str, finished_at: DateTime | None) -> bool:
    """Return whether a run has ended. A status that this version does not know may mean either."""
    return status in ENDED_STATUSES or (status not in WAITING_STATUSES and finished_at is not None)


@dataclass(frozen=True)
class WorkflowRun:
    """
    A workflow run as ``GET /workflows/run/{workflow_run_id}`` describes it.

    :param id: the run's UUID.
    :param workflow_id: the UUID of the workflow version that ran.
    :param status: a :class:`WorkflowRunStatus`, or the text itself where the server knows one that we don't.
    :param inputs: what the run was started with, Dify's ``sys.*`` entries included.
    :param outputs: what the end node returned; ``None`` where the server said null, ``{}`` where it has none yet.
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
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return is_over(self.status, self.finished_at)

    @property
    def app_id(self) -> str | None:
        """The UUID of the run's app; ``None`` where the server doesn't say."""
        return app_id_from(self.inputs)

    def without_payload(self) -> dict[str, Any]:
        """
        Return everything but inputs and outputs, as values that any XCom backend takes.

        :return: ``id, workflow_id, status, error, total_steps, total_tokens, created_at, finished_at, elapsed_time``;
            times as ISO 8601 text.
        """
        return {name: storable(value) for name, value in vars(self).items() if name not in ("inputs", "outputs")}


@dataclass(frozen=True)
class AppInfo:
    """
    The app that an API key belongs to, as ``GET /info`` describes it.

    :param name: the app's name in Dify's console.
    :param mode: ``workflow``, ``advanced-chat``, ``chat``, ...; ``None`` on servers that don't say.
    """

    name: str
    mode: str | None

    @property
    def has_workflow_runs(self) -> bool:
        """Whether run details can be read with this app's key; assumed where the server doesn't say."""
        return self.mode is None or self.mode in APP_MODES_WITH_WORKFLOW_RUNS


@dataclass(frozen=True)
class LoggedWorkflowRun:
    """
    A workflow run as a row of ``GET /workflows/logs`` describes it: without inputs and outputs.

    :param workflow_run_id: the run's UUID.
    :param status: as in :class:`WorkflowRun`.
    :param user: the ``user`` that started it through the API; a name that Dify made, for a web app's visitor or a
        webhook; ``None`` for Dify's own schedule.
    :param error: Dify's own words on why it failed.
    :param total_steps: nodes run.
    :param total_tokens: language model tokens used.
    :param created_at: when it was created, in UTC.
    :param finished_at: when it ended, in UTC.
    :param elapsed_time: seconds it took.
    :param exceptions_count: nodes that failed and whose error handling took over.
    :param triggered_from: what started it: ``app-run``, ``debugging``, ``webhook``, ``schedule``, ...
    :param version: the version of the workflow that ran.
    :param logged_at: when the row itself was written, in UTC: the log is sorted and filtered by it. Dify before 1.9
        writes the row when the run ends.
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
    exceptions_count: int | None = None
    triggered_from: str | None = None
    version: str | None = None
    logged_at: DateTime | None = None

    @property
    def is_over(self) -> bool:
        """Whether the run has ended."""
        return is_over(self.status, self.finished_at)


@dataclass(frozen=True)
class RowWithoutRun:
    """
    A row of ``GET /workflows/logs`` whose run has no record: not yet, or no longer, because it was deleted. Its fields
    are as in :class:`LoggedWorkflowRun`.
    """

    row_id: str
    user: str | None
    logged_at: DateTime | None

    def may_get_record(self, now: float) -> bool:
        """Return whether the run's record may still come at ``now`` (epoch seconds); else the run was deleted."""
        return self.logged_at is not None and now - self.logged_at.timestamp() <= RECORD_DELAY


LogRow: TypeAlias = LoggedWorkflowRun | RowWithoutRun


def row_key(row: LogRow) -> str:
    """Return what a row of the log is recognized by on another page."""
    return row.workflow_run_id if isinstance(row, LoggedWorkflowRun) else row.row_id


def time_of(row: LogRow) -> DateTime | None:
    """Return when Dify wrote a row of the log; when its run began, where the server doesn't say."""
    return row.logged_at or (row.created_at if isinstance(row, LoggedWorkflowRun) else None)


def runs_of(rows: Iterable[LogRow]) -> list[LoggedWorkflowRun]:
    """Return the runs of a log's rows, but those that have no record."""
    return [row for row in rows if isinstance(row, LoggedWorkflowRun)]


def known_fields(kind: type[Any], data: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a dataclass has fields for, out of data that another version of this package may have stored."""
    names = {known.name for known in fields(kind)}
    return {name: value for name, value in data.items() if name in names}


def storable(value: Any) -> Any:
    """
    Return a value as every database takes it: text without NUL and lone surrogates, whole numbers of 64 bits, times as
    ISO 8601 text.
    """
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")
    return None if isinstance(value, int) and not -(2**63) <= value < 2**63 else value


def app_id_from(inputs: object) -> str | None:
    """Return the UUID of a run's app, out of the run's inputs; ``None`` where Dify's ``sys.*`` doesn't name it."""
    try:
        return str(uuid.UUID(inputs["sys.app_id"])) if isinstance(inputs, dict) else None
    except (KeyError, ValueError, AttributeError, TypeError):
        return None


def is_server_from(version: str | None, first: tuple[int, int]) -> bool | None:
    """
    Return whether a server is of that version (major, minor) or later; ``None`` where that can't be known. Each
    response names its version in ``X-Version``, such as ``1.16.1``.
    """
    try:
        major, minor = (version or "").split(".")[:2]
        return (int(major), int(minor)) >= first
    except ValueError:
        return None


# Enough to recognise a login page, never more than a line.
EXCERPT_LENGTH = 120
# Enough for any error text that a person can use.
REASON_LENGTH = 500

# A URL's user name and password, up to the last @ before the path.
_USERINFO = re.compile(r"//[^/\s]*@")


def one_line(text: object, limit: int = REASON_LENGTH) -> str:
    """Return a foreign text as one printable line that can't forge log lines or colour a terminal; ``…`` where cut."""
    shown = as_text(text)
    # Cut before the work, because a server may send megabytes.
    words = " ".join(shown[: limit * 8].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words[: limit + 1])
    return line if len(line) <= limit else line[:limit] + "…"


def as_text(value: object) -> str:
    """Return a text as it is, and of anything else that JSON can hold, however deep, the ``repr``."""
    if isinstance(value, str):
        return value
    try:
        return repr(value)
    except RecursionError:
        # Parsed with less on the stack than there is here.
        return f"a {type(value).__name__} that is nested too deeply"


def digest_of(text: str, digits: int = 16) -> str:
    """Return the first hexadecimal digits of a text's SHA-256: a short name, from which nobody can read the text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:digits]


def redact(text: str, secrets: Iterable[str]) -> str:
    """Return a text with ``***`` for each secret (empty ones are skipped) and for user names and passwords in URLs."""
    # The longest first, because one secret may be part of another.
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _USERINFO.sub("//***@", text)
