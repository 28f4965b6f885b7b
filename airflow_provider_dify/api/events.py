"""
What Dify's event stream looks like on the wire: ``text/event-stream`` bytes in, typed events out.

A stream starts with ``workflow_started``, which names the run and its task, and ends with ``workflow_finished``,
``workflow_paused`` or ``error``. Pings are a bare ``event: ping`` without data, about every 10 seconds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from airflow_provider_dify.models import app_id_of

STARTED = "workflow_started"
PING = "ping"
# After any of these the stream says no more.
ENDINGS = frozenset({"workflow_finished", "workflow_paused", "error"})


@dataclass(frozen=True)
class WorkflowEvent:
    """
    One event of a workflow run's stream.

    :param name: what happened: ``workflow_started``, ``node_started``, ``node_finished``, ``text_chunk``, ...
    :param workflow_run_id: the run's UUID; ``None`` in an ``error`` from before there was a run.
    :param task_id: the UUID that the stop route takes.
    :param data: what the event tells; here ``inputs`` and ``outputs`` are objects on every server.
    """

    name: str
    workflow_run_id: str | None
    task_id: str | None
    data: dict[str, Any]

    @property
    def app_id(self) -> str | None:
        """The UUID of the run's app, which ``workflow_started`` tells; ``None`` otherwise."""
        return app_id_of(self.data.get("inputs"))

    @property
    def is_ending(self) -> bool:
        """Whether the stream says no more after this event."""
        return self.name in ENDINGS

    def progress(self) -> str | None:
        """
        Tell the event as a line for a task's log.

        :return: a sentence for a node that started or ended, ``None`` for anything else.
        """
        if self.name not in ("node_started", "node_finished"):
            return None
        node = f"Node {self.data.get('title')!r} ({self.data.get('node_type')})"
        if self.name == "node_started":
            return f"{node} started."
        elapsed = self.data.get("elapsed_time")
        took = f" after {elapsed:.2f} seconds" if isinstance(elapsed, (int, float)) else ""
        tokens = (self.data.get("execution_metadata") or {}).get("total_tokens")
        used = f", {tokens} tokens" if tokens else ""
        error = f": {self.data['error']}" if self.data.get("error") else ""
        return f"{node} {self.data.get('status')}{took}{used}{error}."


class EventStreamReader:
    """
    Cut a stream of bytes, in whatever pieces it arrives, into events.

    No library is used for this: the ones for ``requests`` are not part of Airflow, and what Dify sends takes a dozen
    lines. Follows the field rules of the HTML standard's server-sent events, for ``data`` and ``event``.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._searched = 0
        self._data: list[bytes] = []
        self._name = b""

    def feed(self, piece: bytes) -> list[WorkflowEvent]:
        """
        Take in the next piece of the stream.

        :param piece: bytes, cut anywhere, in the middle of a character too.
        :return: the events that the piece completed.
        :raises ValueError: if a ``data`` field is no JSON object with the name of an event.
        """
        self._pending += piece
        events: list[WorkflowEvent] = []
        start = 0
        # Where the last piece ended is where the search goes on: an event may be megabytes long.
        while (end := self._pending.find(b"\n", max(start, self._searched))) >= 0:
            line = bytes(self._pending[start:end]).removesuffix(b"\r")
            start = end + 1
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif line.startswith(b"event:"):
                self._name = line[6:].strip()
            elif not line:
                if self._data:
                    events.append(_event(b"\n".join(self._data)))
                elif self._name == PING.encode():
                    # Told on, so that who follows a run that says nothing else can look at the clock.
                    events.append(WorkflowEvent(PING, None, None, {}))
                self._data, self._name = [], b""
        del self._pending[:start]
        self._searched = len(self._pending)
        return events


def _event(text: bytes) -> WorkflowEvent:
    told = json.loads(text)
    if not isinstance(told, dict) or not isinstance(told.get("event"), str):
        raise ValueError(f"an event of another shape: {text[:120]!r}")
    data = told.get("data")
    return WorkflowEvent(
        name=told["event"],
        workflow_run_id=told.get("workflow_run_id"),
        task_id=told.get("task_id"),
        # An error tells its status, code and message beside its name.
        data=data if isinstance(data, dict) else {k: v for k, v in told.items() if k != "event"},
    )
