"""Starting runs: what is rejected, what queues, and what the client gets of the run's events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aiohttp import web

from tests.dify_stand_in.dialects import Dialect
from tests.dify_stand_in.events import PING, EventLog, RecordedStream
from tests.dify_stand_in.input_form import keep_known, rejection, uploaded_files
from tests.dify_stand_in.recordings import json_response
from tests.dify_stand_in.runs import Run, Start, Started, is_run_id

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn

Write = Callable[[bytes], Awaitable[None]]


@dataclass(frozen=True)
class Accepted:
    """A start that Dify took: the run, where it becomes one, and the events that its client gets."""

    run: Run | None
    start: Start
    events: EventLog
    streaming: bool


class Starts:
    """
    Responds to requests to start a run.

    :param stand_in: what has the settings and the runs.
    """

    def __init__(self, stand_in: DifyStandIn) -> None:
        self.stand_in = stand_in

    @property
    def dialect(self) -> Dialect:
        """The version that the stand-in speaks like."""
        return self.stand_in.dialect_rules

    async def respond(self, request: web.Request, workflow_id: str | None) -> web.StreamResponse:
        """Start a run, or reject the request, and respond."""
        accepted = await self.accept(request, workflow_id)
        if isinstance(accepted, web.Response):
            return accepted
        if not accepted.streaming:
            return await self._blocking(accepted)
        response = self.dialect.event_stream()
        if self.stand_in.announces_runs and accepted.run is not None:
            response.headers["X-Workflow-Run-ID"] = accepted.run.id
        await response.prepare(request)
        # What becomes of the client changes nothing for the run.
        with contextlib.suppress(ConnectionError):
            await self.send(accepted, request, response.write)
        return response

    async def accept(self, request: web.Request, workflow_id: str | None) -> web.Response | Accepted:
        """
        Take a request to start a run, without responding to it.

        :param request: the request.
        :param workflow_id: the workflow version in the path, if any.
        :return: the response to a request that is rejected; else what Dify does with it.
        """
        try:
            body = await request.json()
        except ValueError:
            return _invalid("Failed to decode JSON object", code="bad_request")
        refused = self._refused(body, workflow_id)
        if refused is not None:
            return refused
        streaming = body.get("response_mode", "blocking") == "streaming"
        inputs, form = body["inputs"], self.stand_in.user_input_form
        reason = rejection(form, inputs) if form is not None else None
        reason = reason or self._wrong_file(inputs, body["user"])
        if reason is not None:
            return self._reject(reason, streaming)
        start = self.stand_in.starts.popleft() if self.stand_in.starts else Start()
        recording = self.dialect.recording(start.recording)
        if recording.status != 200:
            return recording.response()
        run = Run(str(uuid.uuid4()), deque([None]), task_id=str(uuid.uuid4()), user=body["user"], start=start)
        stream = RecordedStream.load(recording.body, run.id, run.task_id, start.insert)
        run.events = EventLog(PING if self.dialect.queues_starts and start.raw is None else b"")
        run.inputs = kept = inputs if form is None else keep_known(form, inputs)
        self.stand_in.started.append(Started(run.id, run.task_id, run.user, kept, workflow_id))
        self.stand_in.accepted.append(run)
        self.stand_in.active.append(run)
        queues = streaming and self.dialect.queues_starts
        self.stand_in.spawn(self.stand_in.execution.execute(run, stream, queues=queues))
        return Accepted(run, start, run.events, streaming)

    def _refused(self, body: dict[str, Any], workflow_id: str | None) -> web.Response | None:
        if self.stand_in.app_mode != "workflow":
            return self.dialect.response("run_chat_key")
        if not body.get("user"):
            return self.dialect.response("run_missing_user")
        if not isinstance(body.get("inputs"), dict):
            return _invalid("1 validation error for WorkflowRunPayload\ninputs\n  Field required")
        if body.get("response_mode", "blocking") not in ("blocking", "streaming"):
            return _invalid("1 validation error for WorkflowRunPayload\nresponse_mode\n  Input should be 'blocking'")
        if workflow_id is not None and not is_run_id(workflow_id.lower()):
            return _invalid(f"Invalid workflow_id format: '{workflow_id}'.", code="bad_request")
        limit = self.stand_in.active_runs_limit
        # A batch may have had a hundred thousand runs before.
        active = self.stand_in.active = [run for run in self.stand_in.active if not run.finished]
        if limit is not None and len(active) >= limit:
            recorded = self.dialect.recording("run_rate_limited_streaming").fields()
            message = recorded["message"].rpartition(" is ")[0] + f" is {limit}."
            return _invalid(message)
        return None

    def _wrong_file(self, inputs: dict[str, Any], user: str) -> str | None:
        for file_id in uploaded_files(inputs):
            owner = self.stand_in.upload_users.get(file_id)
            if owner is None or (self.dialect.checks_file_owner and owner != user):
                return "Invalid upload file"
        return None

    def _reject(self, reason: str, streaming: bool) -> web.Response | Accepted:
        if not streaming or self.dialect.rejection == "error":
            return _invalid(reason)
        events = EventLog(PING)
        if self.dialect.rejection == "phantom":
            self.stand_in.spawn(self._phantom(events, reason))
        return Accepted(None, Start(), events, streaming)

    async def _phantom(self, events: EventLog, reason: str) -> None:
        """Publish the events of a run that no route knows. It waits for a slot like any other."""
        recorded = self.dialect.recording("run_streaming_missing_input").body
        phantom = str(uuid.uuid4())
        stream = RecordedStream.load(recorded, phantom, phantom)
        said = json.dumps(reason, ensure_ascii=False).encode()
        async with self.stand_in.execution.slots:
            rest = stream.rest.replace(b'"query is required in input form"', said)
            events.publish(stream.beginning + rest)
            events.close()

    # --- responses

    async def send(self, accepted: Accepted, request: web.Request, write: Write) -> None:
        """
        Send a run's events as they come, up to the cut of its start, or until nothing came for too long.

        :param accepted: the start.
        :param request: the client's request, whose connection may be cut.
        :param write: sends bytes to the client.
        """
        start = accepted.start
        sent = 0
        limit = self.stand_in.silence_limit
        silence_ends = time.monotonic() + limit
        while True:
            data = bytes(accepted.events.data)
            end = _cut(start.cut, data)
            for begin in range(sent, min(len(data), end), start.piece):
                await write(data[begin : min(begin + start.piece, end)])
            sent = max(sent, min(len(data), end))
            if sent >= end:
                await self._at_the_cut(start, request, write)
                return
            if len(accepted.events.data) > sent:
                continue
            if accepted.events.closed:
                break
            begun = len(accepted.events.data) > len(PING) or not self.dialect.queues_starts
            if begun:
                if not await accepted.events.wait(self.stand_in.ping_interval):
                    await write(PING)
            elif not await accepted.events.wait(max(0.0, silence_ends - time.monotonic())):
                return
        if start.then == "close" or start.cut is None:
            await asyncio.sleep(self.stand_in.close_delay)
        if start.then != "close":
            await self._at_the_cut(start, request, write)

    async def _at_the_cut(self, start: Start, request: web.Request, write: Write) -> None:
        assert request.transport is not None
        if start.then == "reset":
            request.transport.abort()
        elif start.then == "stall":
            await asyncio.sleep(30)
        elif start.then == "pings":
            while True:
                await write(PING)
                await asyncio.sleep(0.1)
        elif start.cut is not None:
            request.transport.close()

    async def _blocking(self, accepted: Accepted) -> web.Response:
        run = accepted.run
        assert run is not None
        while not accepted.events.closed:
            await accepted.events.wait(self.stand_in.silence_limit)
        status = str(run.status)
        if status == "paused" and not self.dialect.queues_starts:
            # 1.12.1 leaves the client without a response until a proxy gives up.
            await asyncio.sleep(self.stand_in.silence_limit)
            return web.Response(status=504)
        names = {"paused": "run_blocking_paused", "failed": "run_blocking_failed"}
        recording = self.dialect.recording(names.get(status, "run_blocking_succeeded_echo"))
        fields = recording.fields()
        now = run.now
        assert now is not None
        outputs = json.loads(now["outputs"]) if isinstance(now["outputs"], str) else now["outputs"]
        fields |= {"task_id": run.task_id, "workflow_run_id": run.id}
        fields["data"] |= {key: now[key] for key in fields["data"].keys() & now.keys()} | {"outputs": outputs}
        return web.json_response(fields)


def _cut(cut: int | str | None, data: bytes) -> int:
    """Return after how many bytes to stop; one more than there are where the cut is still to come."""
    if isinstance(cut, int):
        return cut
    found = data.find(b'"event":"%b"' % cut.encode()) if cut else -1
    return len(data) + 1 if found < 0 else data.index(b"\n\n", found) + 2


def _invalid(message: str, code: str = "invalid_param") -> web.Response:
    return json_response({"code": code, "message": message, "status": 400}, status=400)
