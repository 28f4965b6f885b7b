"""How runs execute: one after another in the slots that there are, with pauses and stops."""

from __future__ import annotations

import asyncio
import json
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from tests.dify_stand_in.dialects import FINISHED, Dialect
from tests.dify_stand_in.events import RecordedStream, dump, finished, parse, split, with_fields, with_ids
from tests.dify_stand_in.recordings import Recording
from tests.dify_stand_in.runs import Form, Run

if TYPE_CHECKING:
    from tests.dify_stand_in.server import DifyStandIn


class Slots:
    """The places in which runs execute, first come, first served; without end if ``count`` is ``None``."""

    def __init__(self) -> None:
        self.count: int | None = None
        self.busy = 0
        self._queue: deque[asyncio.Future[None]] = deque()

    def _is_free(self) -> bool:
        return self.count is None or self.busy < self.count

    async def __aenter__(self) -> None:
        if self._queue or not self._is_free():
            turn = asyncio.get_running_loop().create_future()
            self._queue.append(turn)
            await turn
        else:
            self.busy += 1

    async def __aexit__(self, *_: object) -> None:
        self.busy -= 1
        self.serve()

    def serve(self) -> None:
        """Let those in who are next, as far as there are free places."""
        while self._queue and self._is_free():
            turn = self._queue.popleft()
            if not turn.done():
                self.busy += 1
                turn.set_result(None)


class Execution:
    """
    Executes the runs of one stand-in.

    :param stand_in: what has the settings, the runs and the log.
    """

    def __init__(self, stand_in: DifyStandIn) -> None:
        self.stand_in = stand_in
        self.slots = Slots()
        self._stops: dict[str, asyncio.Event] = {}

    @property
    def dialect(self) -> Dialect:
        """The version that the stand-in speaks like."""
        return self.stand_in.dialect_rules

    async def execute(self, run: Run, stream: RecordedStream, *, queues: bool) -> None:
        """
        Execute a run: wait for a slot, begin, publish its events, end.

        :param run: the run; nobody knows of it before it begins.
        :param stream: its events.
        :param queues: whether it needs a slot.
        """
        if not queues:
            await self._execute(run, stream)
            return
        async with self.slots:
            await self._execute(run, stream)

    async def _execute(self, run: Run, stream: RecordedStream) -> None:
        start = run.start
        assert start is not None
        duration = self.stand_in.run_duration if start.duration is None else start.duration
        statuses = start.statuses or (stream.status,)
        run.created_at = int(time.time())
        run.responses = deque(
            [self._detail("running", run, start.fields)]
            if duration
            else [None if status is None else self._detail(status, run, start.fields) for status in statuses]
        )
        if start.exceptions_count is not None:
            run.exceptions_count = start.exceptions_count
        elif statuses[-1] in ("failed", "partial-succeeded"):
            run.exceptions_count = 1
        self.stand_in.runs[run.id] = run
        self.stand_in.log.append(run)
        if self.stand_in.outputs_of is not None:
            await self._return(run, stream, duration)
            return
        if start.raw is not None:
            for part in start.raw:
                if isinstance(part, bytes):
                    run.events.publish(with_ids(part, run.id, run.task_id))
                else:
                    await asyncio.sleep(part)
            run.events.close()
            return
        rest = with_fields(stream.rest, start.fields) if statuses[-1] == stream.status else stream.rest
        if duration:
            run.events.publish(stream.beginning)
            if await self._stopped_within(run, duration):
                await self._end_stopped(run)
                return
            run.responses = deque([self._detail(str(statuses[-1]), run, start.fields)])
            run.events.publish(self._with_form(run, rest))
        else:
            run.events.publish(self._with_form(run, stream.beginning + rest))
        run.events.close()

    async def _return(self, run: Run, stream: RecordedStream, duration: float) -> None:
        """Let a run succeed with what the test's function returns for it."""
        run.events.publish(stream.beginning)
        run.responses = deque([self._detail("running", run, {})])
        if await self._stopped_within(run, duration):
            await self._end_stopped(run)
            return
        assert self.stand_in.outputs_of is not None
        outputs = {"outputs": self.stand_in.outputs_of(run)}
        run.responses = deque([self._detail("succeeded", run, outputs)])
        run.events.publish(with_fields(stream.rest, outputs))
        run.events.close()

    def _detail(self, status: str, run: Run, fields: dict[str, Any]) -> dict[str, Any]:
        times: dict[str, Any] = {"created_at": run.created_at}
        if not status.startswith("detail_"):
            times["finished_at"] = int(time.time()) if status in FINISHED else None
        if self.stand_in.echoes_inputs:
            times["inputs"] = shown = self.stand_in.files.shown(run.inputs)
            times["outputs"] = shown if status == "succeeded" else {}
        return self.dialect.run_detail(status, run.id, {**times, **fields})

    # --- stops

    async def _stopped_within(self, run: Run, seconds: float) -> bool:
        stop = self._stops.setdefault(run.id, asyncio.Event())
        try:
            await asyncio.wait_for(stop.wait(), seconds)
        except asyncio.TimeoutError:
            return False
        finally:
            del self._stops[run.id]
        return True

    async def _end_stopped(self, run: Run) -> None:
        by_user = self._detail("stopped", run, {"error": self.dialect.stop_text})
        run.events.publish(dump(finished(run.id, run.task_id, by_user, run.user)))
        run.events.close()
        await self.write_stop(run)

    async def write_stop(self, run: Run) -> None:
        """Write into a run's detail that it was stopped, if this version does so, a moment after the stop."""
        leaves_running = self.stand_in.stop_leaves_running
        if not self.dialect.stop_is_recorded if leaves_running is None else leaves_running:
            return
        await asyncio.sleep(self.stand_in.stop_delay)
        run.responses = deque([self._detail("stopped", run, {"error": "Aborted: User requested stop"})])

    def stop(self, task_id: str) -> None:
        """Stop the run of a task, as far as this version does. No other id does anything, and a queued run has none."""
        run = next((run for run in self.stand_in.log if run.task_id == task_id), None)
        if run is None or run.finished:
            return
        run.stop_requested = True
        if run.status == "paused":
            return
        if run.id in self._stops:
            self._stops[run.id].set()
        else:
            self.stand_in.spawn(self.write_stop(run))

    # --- pauses

    def _with_form(self, run: Run, events: bytes) -> bytes:
        """Put a new token into the form in a run's events, and keep it."""
        recorded = next(
            (event for event in map(parse, split(events)) if event.get("event") == "human_input_required"), None
        )
        if recorded is None:
            return events
        run.form = Form(recorded["data"] | {"expiration_time": int(time.time()) + 3 * 24 * 3600})
        for name, new in (
            ("form_token", run.form.token),
            ("form_id", run.form.form_id),
            ("expiration_time", run.form.fields["expiration_time"]),
        ):
            events = events.replace(str(recorded["data"][name]).encode(), str(new).encode())
        return events

    async def resume(self, run: Run, inputs: dict[str, Any]) -> None:
        """
        Let a paused run continue after its form was sent, to the end that it has on this version.

        :param run: the paused run.
        :param inputs: what the person entered.
        """
        assert run.start is not None
        fields = {"outputs": {**inputs, "text": "q"}, "total_steps": 5, **run.start.fields}
        was_stopped = run.stop_requested and self.dialect.stop_is_recorded
        running = self._detail("running", run, {key: value for key, value in fields.items() if key != "outputs"})
        async with self.slots:
            run.responses = deque([running])
            run.events.reopen()
            status = self.dialect.resumed_status
            events = self._resumption(run, inputs)
            run.events.publish(b"".join(events[:-1]))
            await asyncio.sleep(self.stand_in.resume_duration)
            if was_stopped and status == "succeeded":
                # Measured on 1.17. By upstream's #40905, which came later, such a stop is forgotten.
                await self._end_stopped(run)
                return
            if run.stop_requested and not self.dialect.stop_is_recorded:
                # Measured on 1.14.2: a run that was stopped while it was paused, and then resumed, stays running.
                run.events.close()
                return
            run.events.publish(events[-1])
            run.events.close()
            error = self.stand_in.resumed_error if status == "stopped" else None
            run.responses = deque([self._detail(status, run, {"error": error, **fields})])

    def _resumption(self, run: Run, inputs: dict[str, Any]) -> list[bytes]:
        # 1.15.0 ends them as 1.14.2 does.
        version = "1.14.2" if self.dialect.version < "1.16" else self.dialect.version
        stream = RecordedStream.load(Recording.load("events_across_resume", version).body, run.id, run.task_id)
        events = split(stream.beginning + stream.rest)
        paused = max(index for index, event in enumerate(events) if parse(event).get("event") == "workflow_paused")
        comment = json.dumps(inputs.get("comment", ""), ensure_ascii=False).encode()
        return [event.replace(b'"fine"', comment) for event in events[paused + 1 :]]
