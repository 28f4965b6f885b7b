"""The workflow runs of the stand-in, and how they are started."""

from __future__ import annotations

import secrets
import time
import uuid
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from tests.dify_stand_in.dialects import FINISHED
from tests.dify_stand_in.events import EventLog
from tests.dify_stand_in.faults import Fault


@dataclass
class Form:
    """The form of a paused run: its fields as the recorded event has them, and whether a person sent it."""

    fields: dict[str, Any]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    form_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    submitted: bool = False


@dataclass
class Run:
    """
    A workflow run of the stand-in: the responses still to come, one a poll; the last one stays.

    With ``duration`` the first response stays for so many seconds from the first poll, then comes the last one.
    """

    id: str
    responses: deque[dict[str, Any] | None]
    fault_after_first: Fault | None = None
    duration: float | None = None
    polls: list[float] = field(default_factory=list)
    # What a started run has, too.
    task_id: str = ""
    user: str = ""
    inputs: dict[str, Any] = field(default_factory=dict)
    start: Start | None = None
    created_at: int = 0
    exceptions_count: int = 0
    triggered_from: str = "app-run"
    # Whether its row in the log has no run: its record is not written yet, or deleted already.
    has_no_record: bool = False
    stop_requested: bool = False
    form: Form | None = None
    events: EventLog = field(default_factory=EventLog)

    def poll(self) -> dict[str, Any] | None:
        """Return the next detail, ``None`` for "not written yet"."""
        self.polls.append(time.monotonic())
        if self.duration is not None:
            return self.responses[-1 if self.polls[-1] - self.polls[0] >= self.duration else 0]
        return self.responses.popleft() if len(self.responses) > 1 else self.responses[0]

    @property
    def now(self) -> dict[str, Any] | None:
        """The detail that the next poll would find."""
        if self.duration is not None and self.polls:
            return self.responses[-1 if time.monotonic() - self.polls[0] >= self.duration else 0]
        return self.responses[0]

    @property
    def status(self) -> str | None:
        """The status that the next poll would find."""
        return self.now["status"] if self.now else None

    @property
    def finished(self) -> bool:
        """Whether the run is over."""
        return self.status in FINISHED


@dataclass(frozen=True)
class Start:
    """
    How the stand-in responds to a request to start a run.

    :param recording: the stream to replay, with ids of its own.
    :param statuses: what polls of the run's detail then find, as for :meth:`DifyStandIn.add_run`; by default how the
        recorded stream ends.
    :param cut: after how many bytes of the stream to stop, or after which event (``workflow_started``); at its end by
        default.
    :param then: what comes at the cut: ``close``, ``reset``, ``stall`` or ``pings``.
    :param piece: how many bytes to send at once.
    :param fields: as for :meth:`DifyStandIn.add_run`.
    :param duration: for how many seconds the run runs, and holds its slot; by default :attr:`DifyStandIn.run_duration`.
        Its last nodes' events and its last status come at the end of it.
    :param insert: events to add to the stream, before the last node that starts.
    :param exceptions_count: what its row in the log says.
    :param raw: what the client gets instead of a recording: bytes of events, such as those of
        :func:`~tests.dify_stand_in.said`, and pauses in seconds. ``statuses`` are what polls find meanwhile; with
        ``(None,)`` there is no record, and nothing in the log.
    """

    recording: str = "run_streaming_echo"
    statuses: tuple[str | None, ...] | None = None
    cut: int | str | None = None
    then: str = "close"
    piece: int = 100_000
    fields: dict[str, Any] = field(default_factory=dict)
    duration: float | None = None
    insert: tuple[dict[str, Any], ...] = ()
    exceptions_count: int | None = None
    raw: tuple[bytes | float, ...] | None = None


@dataclass(frozen=True)
class Started:
    """A run that the stand-in was asked to start, and when (epoch seconds)."""

    workflow_run_id: str
    task_id: str
    user: str
    inputs: dict[str, Any]
    workflow_id: str | None
    at: float = field(default_factory=time.time)


@dataclass(frozen=True)
class ReceivedRequest:
    """A request that reached the stand-in."""

    method: str
    path: str
    headers: dict[str, str]
    at: float
    connection: int


def is_run_id(text: str) -> bool:
    """Return whether a text is a UUID as Dify writes it."""
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
