"""The event stream of a run: parts of a recorded one, events that none was recorded of, and those who follow it."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

PING = b"event: ping\n\n"


def split(stream: bytes) -> list[bytes]:
    """Split the bytes of a stream after each event's empty line."""
    return [part + b"\n\n" for part in stream.split(b"\n\n") if part.strip()]


def parse(event: bytes) -> dict[str, Any]:
    """Return the JSON object of one event; an empty one for a ping."""
    text = event.strip()
    return json.loads(text.removeprefix(b"data: ")) if text.startswith(b"data: ") else {}


def dump(event: dict[str, Any]) -> bytes:
    """Return the bytes of one event, as Dify writes it: compact, and not ASCII only."""
    data = json.dumps(event, ensure_ascii=False, separators=(",", ":"))
    # Half a character goes as JSON writes it: \ud83d.
    return b"data: " + data.encode(errors="backslashreplace") + b"\n\n"


@dataclass(frozen=True)
class RecordedStream:
    """
    A recorded stream in parts, with the ids of a new run.

    :param beginning: what comes as soon as the run begins.
    :param rest: what comes at its end.
    """

    beginning: bytes
    rest: bytes

    @classmethod
    def load(cls, body: bytes, run_id: str, task_id: str, inserted: tuple[dict[str, Any], ...] = ()) -> RecordedStream:
        """
        Take a recorded stream apart.

        :param body: the recorded bytes.
        :param run_id: the workflow run's id, in place of the recorded one.
        :param task_id: the task's id, in place of the recorded one.
        :param inserted: events to add before the last node that starts; their ids are set.
        :return: the parts.
        """
        events = split(body)
        first = next(event for event in map(parse, events) if event)
        for recorded, new in ((first["workflow_run_id"], run_id), (first["task_id"], task_id)):
            events = [event.replace(recorded.encode(), new.encode()) for event in events]
        if events[0] == PING:
            # It comes before the run has a slot.
            del events[0]
        starts = [index for index, event in enumerate(events) if parse(event).get("event") == "node_started"]
        at = starts[-1] if starts else len(events) - 1
        added = [dump({**event, "task_id": task_id, "workflow_run_id": run_id}) for event in inserted]
        return cls(b"".join([*events[:at], *added]), b"".join(events[at:]))

    @property
    def status(self) -> str:
        """The status that the run has at the end of the stream."""
        last = [event for event in map(parse, split(self.rest)) if event]
        status = last[-1]["data"].get("status") if last else None
        if last and last[-1]["event"] in ("workflow_finished", "workflow_paused"):
            return str(status)
        # 1.12.1 sends nothing but pings while a run is paused.
        return "paused" if b'"node_type":"human-input"' in self.beginning + self.rest else "running"


class EventLog:
    """
    What a run has published so far. Whoever follows it reads on from an offset of their own.

    :param data: what stands in it already.
    """

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)
        self.closed = False
        self._changed = asyncio.Event()

    def publish(self, data: bytes) -> None:
        """Add events."""
        self.data += data
        self._notify()

    def close(self) -> None:
        """Mark that no more events come, for now."""
        self.closed = True
        self._notify()

    def reopen(self) -> None:
        """Mark that more events come after all: a paused run continues."""
        self.closed = False
        self._notify()

    def _notify(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait(self, seconds: float) -> bool:
        """Wait for a change, at most so many seconds; return whether one came."""
        try:
            await asyncio.wait_for(self._changed.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        return True


def finished(run_id: str, task_id: str, detail: dict[str, Any], user: str) -> dict[str, Any]:
    """Return the ``workflow_finished`` event that says what a run's detail says."""
    outputs = detail["outputs"]
    return {
        "event": "workflow_finished",
        "task_id": task_id,
        "workflow_run_id": run_id,
        "data": {
            "id": run_id,
            "workflow_id": detail["workflow_id"],
            "status": detail["status"],
            "outputs": json.loads(outputs) if isinstance(outputs, str) else outputs,
            "error": detail["error"],
            "elapsed_time": detail["elapsed_time"],
            "total_tokens": detail["total_tokens"],
            "total_steps": detail["total_steps"],
            "created_by": {"id": str(uuid.uuid5(uuid.NAMESPACE_URL, user)), "user": user},
            "created_at": detail["created_at"],
            "finished_at": detail["finished_at"],
            "exceptions_count": 0,
            "files": [],
        },
    }


def with_fields(events: bytes, fields: dict[str, Any]) -> bytes:
    """Return events whose ``workflow_finished`` says what the run's detail says: these fields, where it has them."""
    *others, last = split(events)
    event = parse(last)
    if event.get("event") != "workflow_finished" or not fields:
        return events
    data = event["data"]
    known = {name: fields[name] for name in fields.keys() & data.keys()}
    return b"".join([*others, dump({**event, "data": {**data, **known}})])


def snapshot(data: bytes, task_id: str) -> bytes:
    """
    Return the events so far, as the events route repeats them: without texts, pings and the nodes' payloads.

    :param data: the events as they were published.
    :param task_id: the task id that they get: the run's id while it runs, the real one while it is paused.
    """
    repeated = []
    for event in filter(None, map(parse, split(data))):
        if event["event"] == "text_chunk":
            continue
        if event["event"].startswith("node_"):
            event["data"] |= {"inputs": None}
        if event["event"] == "node_finished":
            event["data"] |= {"process_data": None, "outputs": None}
        repeated.append(dump({**event, "task_id": task_id}))
    return b"".join(repeated)


# --- events for ``Start(raw=...)``, in which the ids of the new run are filled in

RUN_ID = "$RUN"
TASK_ID = "$TASK"


def with_ids(events: bytes, run_id: str, task_id: str) -> bytes:
    """Return events of :func:`said` with the ids of a run."""
    return events.replace(RUN_ID.encode(), run_id.encode()).replace(TASK_ID.encode(), task_id.encode())


def said(name: str, data: dict[str, Any] | None = None, **fields: Any) -> bytes:
    """
    Return one event of a run.

    :param name: such as ``node_started``.
    :param data: what it carries.
    :param fields: what stands beside it; ``None`` replaces an id by null.
    """
    return dump({"event": name, "workflow_run_id": RUN_ID, "task_id": TASK_ID, "data": data or {}, **fields})


def said_finished(status: str, outputs: dict[str, Any] | None = None, error: str | None = None, **fields: Any) -> bytes:
    """Return the ``workflow_finished`` of a run that ended with this status; ``fields`` are as for :func:`said`."""
    data = {
        "id": RUN_ID,
        "status": status,
        "outputs": outputs or {},
        "error": error,
        "elapsed_time": 0.5,
        "total_tokens": 7,
        "total_steps": 2,
        "created_at": int(time.time()),
        "finished_at": int(time.time()),
    }
    return said("workflow_finished", data, **fields)


def said_error(message: str, status: int, code: str | None = None, **fields: Any) -> bytes:
    """Return an ``error`` event from before there is a run."""
    named = {} if code is None else {"code": code}
    return dump({"event": "error", "workflow_run_id": None, **named, "message": message, "status": status, **fields})


# --- events that no recording has; their fields are those of Dify 1.16.1's source


def node_finished(
    title: str = "LLM",
    node_type: str = "llm",
    *,
    status: str = "succeeded",
    error: str | None = None,
    total_price: str | None = None,
    currency: str = "USD",
    total_tokens: int = 42,
) -> dict[str, Any]:
    """
    Return a ``node_finished`` event, for ``Start(insert=...)``.

    :param total_price: what the node's model cost, as Dify writes it: a decimal number as text; ``None`` for a node
        that is no model's.
    :param currency: of the price.
    """
    metadata = {"total_tokens": total_tokens, "total_price": total_price, "currency": currency} if total_price else None
    data = _node(title, node_type) | {
        "process_data": {},
        "outputs": {},
        "status": status,
        "error": error,
        "elapsed_time": 0.25,
        "execution_metadata": metadata,
        "finished_at": int(time.time()),
        "files": [],
        "iteration_id": None,
        "loop_id": None,
    }
    return {"event": "node_finished", "data": data}


def node_retry(title: str = "HTTP", error: str = "[Errno 111] Connection refused", index: int = 1) -> dict[str, Any]:
    """Return the event of a node that failed and is tried again, the ``index``-th time."""
    event = node_finished(title, "http-request", status="retry", error=error)
    return {"event": "node_retry", "data": event["data"] | {"retry_index": index}}


def iteration(title: str = "Each row", items: int = 3, *, kind: str = "iteration") -> tuple[dict[str, Any], ...]:
    """Return the events of an iteration, or of a loop with ``kind="loop"``: its start, each item, its end."""
    node = _node(title, kind)
    started = {"event": f"{kind}_started", "data": node | {"extras": {}, "metadata": {"iterator_length": items}}}
    nexts = [{"event": f"{kind}_next", "data": node | {"index": index, "extras": {}}} for index in range(items)]
    data = node | {
        "outputs": {"output": []},
        "status": "succeeded",
        "error": None,
        "elapsed_time": 1.5,
        "total_tokens": 0,
        "execution_metadata": {},
        "finished_at": int(time.time()),
        "steps": items,
    }
    return (started, *nexts, {"event": f"{kind}_completed", "data": data})


def _node(title: str, node_type: str) -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "node_id": title.lower().replace(" ", "_"),
        "node_type": node_type,
        "title": title,
        "index": 1,
        "predecessor_node_id": None,
        "inputs": {},
        "created_at": int(time.time()),
    }
