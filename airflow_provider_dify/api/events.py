# SPDX-License-Identifier: Apache-2.0
"""
What Dify's event stream looks like on the wire: ``text/event-stream`` bytes in, typed events out.

A stream starts with ``workflow_started``, which names the run and its task, and ends with ``workflow_finished``,
``workflow_paused`` or ``error``. Pings are a bare ``event: ping`` without data, about every 10 seconds. From Dify 1.13
on the first ping comes at once, before there is a run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from airflow_provider_dify.api.models import (
    ENDED_STATUSES,
    WorkflowRun,
    WorkflowRunStatus,
    app_id_from,
    one_line,
    status_of,
)

_log = logging.getLogger(__name__)

STARTED = "workflow_started"
FINISHED = "workflow_finished"
PAUSED = "workflow_paused"
ERROR = "error"
PING = "ping"
# After any of these the stream has no more events.
ENDINGS = frozenset({FINISHED, PAUSED, ERROR})
# An event has all outputs of a run or a node. One that is larger is left to the run's detail.
MAX_EVENT_MB = 8


@dataclass(frozen=True)
class WorkflowEvent:
    """
    One event of a workflow run's stream.

    :param name: what happened: ``workflow_started``, ``node_started``, ``node_finished``, ``text_chunk``, ...
    :param workflow_run_id: the run's UUID; ``None`` in an ``error`` from before there was a run.
    :param task_id: the UUID that the stop route takes.
    :param data: what the event carries; here ``inputs`` and ``outputs`` are objects on every server.
    """

    name: str
    workflow_run_id: str | None
    task_id: str | None
    data: dict[str, Any]

    @property
    def app_id(self) -> str | None:
        """The UUID of the run's app, which ``workflow_started`` names; ``None`` otherwise."""
        return app_id_from(self.data.get("inputs"))

    @property
    def is_ending(self) -> bool:
        """Whether the stream has no more events after this one."""
        return self.name in ENDINGS

    @property
    def succeeded_run(self) -> WorkflowRun | None:
        """
        The run that this event says has succeeded, without inputs and times; ``None`` for any other event. Dify (1.12.1
        to 1.16.1) makes event and detail of the same outputs and counts, and cuts neither. Of a run that did not
        succeed they may differ, so its detail has to be read.
        """
        run = self.ended_run
        if run is None or run.status != WorkflowRunStatus.SUCCEEDED:
            return None
        # What has another shape is left to the detail's parser, which says what is wrong with it.
        return None if None in (run.outputs, run.total_tokens, run.total_steps, run.elapsed_time) else run

    @cached_property
    def ended_run(self) -> WorkflowRun | None:
        """The run as this event says that it ended, without inputs and times; ``None`` for any other event."""
        data = self.data
        if self.name != FINISHED or data.get("status") not in list(ENDED_STATUSES) or not self.workflow_run_id:
            return None
        outputs, error, seconds = (data.get(name) for name in ("outputs", "error", "elapsed_time"))
        steps, tokens = (n if type(n := data.get(key)) is int else None for key in ("total_steps", "total_tokens"))
        error = error if isinstance(error, str) else None
        return WorkflowRun(
            id=self.workflow_run_id,
            workflow_id=None,
            status=status_of(WorkflowRunStatus(data["status"]), error),
            inputs=None,
            outputs=outputs if isinstance(outputs, dict) else None,
            error=error,
            total_steps=steps,
            total_tokens=tokens,
            created_at=None,
            finished_at=None,
            elapsed_time=seconds if type(seconds) in (int, float) else None,
        )

    @property
    def names_a_rejected_run(self) -> bool:
        """
        Whether this event of a start's own stream names a run that Dify (1.15 and later) rejects without a record.
        Measured on 1.15.0 to 1.17: both ids are the same.
        """
        return self.workflow_run_id is not None and self.task_id == self.workflow_run_id


class EventStreamReader:
    """
    Cuts a stream of bytes, in whatever pieces it arrives, into events, by the rules of the HTML standard for ``data``
    and ``event``. Without a library: those for ``requests`` are not part of Airflow. ``redact`` removes the API key
    from an event's bytes; not from a piece's, which may hold half of the key.
    """

    def __init__(self, redact: Callable[[bytes], bytes] = lambda data: data) -> None:
        self._redact = redact
        self._pending = bytearray()
        self._searched = 0
        self._data: list[bytes] = []
        self._size = 0
        self._name = b""
        self._has_warned = False

    def feed(self, piece: bytes) -> list[WorkflowEvent]:
        """Return the events that the next piece, cut anywhere, completes. Raises a ValueError if one doesn't end."""
        self._pending += piece
        events: list[WorkflowEvent] = []
        start = 0
        # Where the last piece ended is where the search goes on: an event may be megabytes long.
        while (end := self._pending.find(b"\n", max(start, self._searched))) >= 0:
            line = bytes(self._pending[start:end]).removesuffix(b"\r")
            start = end + 1
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
                self._size += len(line)
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
            elif not line:
                if self._data:
                    events.extend(self._read_event(self._redact(b"\n".join(self._data))))
                elif self._name == PING.encode():
                    # Passed on, so that a reader of a silent run can look at the clock.
                    events.append(WorkflowEvent(PING, None, None, {}))
                self._data, self._size, self._name = [], 0, b""
        del self._pending[:start]
        self._searched = len(self._pending)
        if self._size + len(self._pending) > MAX_EVENT_MB * 2**20:
            raise ValueError(f"an event of more than {MAX_EVENT_MB} MB without an end")
        return events

    def _read_event(self, text: bytes) -> list[WorkflowEvent]:
        """Return the event; none, with a warning, for one that is not Dify's, such as the ``[DONE]`` of a gateway."""
        try:
            return [_parse_event(text)]
        except ValueError as error:
            if not self._has_warned:
                # Once a stream: a gateway may add a line to each event.
                self._has_warned = True
                _log.warning("An event of the stream could not be read and is left out: %s", one_line(str(error), 200))
            return []


def _parse_event(text: bytes) -> WorkflowEvent:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{type(error).__name__} in {text[:120]!r}") from error
    if not isinstance(fields, dict) or not isinstance(fields.get("event"), str):
        raise ValueError(f"another shape: {text[:120]!r}")
    data, run_id, task_id = (fields.get(name) for name in ("data", "workflow_run_id", "task_id"))
    return WorkflowEvent(
        name=fields["event"],
        workflow_run_id=(isinstance(run_id, str) and run_id) or None,
        task_id=(isinstance(task_id, str) and task_id) or None,
        # An error has its status, code and message beside its name.
        data=data if isinstance(data, dict) else {k: v for k, v in fields.items() if k != "event"},
    )
