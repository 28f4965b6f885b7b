# SPDX-License-Identifier: Apache-2.0
"""A run followed to its end: by its events, and by polls where these break off."""

from __future__ import annotations

import math
import time
from datetime import datetime, timezone
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.events import ERROR, FINISHED, WorkflowEvent
from airflow_provider_dify.api.models import WAITING_STATUSES, WorkflowRun, as_text, one_line
from airflow_provider_dify.api.run_stream import SECONDS_AFTER_ERROR, AsyncWorkflowRunStream
from airflow_provider_dify.exceptions import DifyConnectionError, DifyInputsRejected, DifyWorkflowRunNotFound
from airflow_provider_dify.runs.log import RETRY_DELAY, delay_after
from airflow_provider_dify.runs.waiting import Deadline, Outcome, RunWait, Verdict, WaitArguments

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

    from airflow_provider_dify.api.client import DifyClient


_TITLE_LENGTH = 80
_ITERATION_ENDS = {"iteration_completed": "Iteration", "loop_completed": "Loop"}


class RunProgress:
    """The progress of one run, out of its events in turn; with lines for a log, or without."""

    def __init__(self, *, has_lines: bool = True) -> None:
        self._has_lines = has_lines
        # The one that failed last, with its error, and its id, title and type.
        self.failed_node: str | None = None
        self.failed_node_facts: dict[str, str] | None = None
        # What the stream ended the run with.
        self.final_status: str | None = None
        self.final_error: str | None = None
        # By Dify, which keeps no record of such a run.
        self.was_rejected = False
        self._prices: dict[str, Decimal] = {}

    @property
    def price(self) -> dict[str, str]:
        """``total_price`` as decimal text, and ``currency``; empty before the run's end, and for two currencies."""
        if self.final_status is None or len(self._prices) != 1:
            return {}
        ((currency, total),) = self._prices.items()
        return {"total_price": format(total, "f"), "currency": currency}

    def on_event(self, event: WorkflowEvent) -> str | None:
        """Note what the run's next event says; return a line for the task's log, or ``None``."""
        data = event.data
        if event.names_a_rejected_run:
            self.was_rejected = True
        if event.name == FINISHED:
            self.final_status = _text(data, "status")
            self.final_error = _text(data, "error")
            self.was_rejected = self.was_rejected and self.final_status == "failed"
            return None
        if event.name == "node_finished":
            self._add_price(data.get("execution_metadata"))
            if data.get("status") == "failed":
                self.failed_node = f"{_node(data)} failed: {_error(data)}."
                names = {"id": "node_id", "title": "title", "type": "node_type"}
                self.failed_node_facts = {key: one_line(data.get(name), _TITLE_LENGTH) for key, name in names.items()}
        # One line for an iteration or a loop, not one for each node of each of its items.
        if not self._has_lines or data.get("iteration_id") or data.get("loop_id"):
            return None
        return _line(event.name, data)

    def _add_price(self, metadata: Any) -> None:
        if not isinstance(metadata, dict) or not isinstance(metadata.get("currency"), str):
            return
        try:
            price = Decimal(as_text(metadata.get("total_price")))
        except InvalidOperation:
            return
        # Bounded both ways: as decimal text, 1e-999999 would be a megabyte.
        if price.is_finite() and -30 < (price or Decimal()).adjusted() < 9:
            currency = one_line(metadata["currency"], 10)
            self._prices[currency] = self._prices.get(currency, Decimal()) + (price or Decimal())


def _line(name: str, data: dict[str, Any]) -> str | None:
    error = f": {_error(data)}" if data.get("error") else ""
    if name == "node_started":
        return f"{_node(data)} started."
    if name == "node_finished":
        metadata = data.get("execution_metadata")
        tokens = metadata.get("total_tokens") if isinstance(metadata, dict) else None
        used = f", {tokens} tokens" if isinstance(tokens, int) and tokens else ""
        return f"{_node(data)} {one_line(data.get('status'), 30)}{_took(data)}{used}{error}."
    if name == "node_retry":
        return f"{_node(data)} failed and runs again, retry {one_line(data.get('retry_index'), 10)}: {_error(data)}."
    if name in _ITERATION_ENDS:
        steps = data.get("steps")
        items = f", {steps} items" if isinstance(steps, int) else ""
        title = one_line(data.get("title"), _TITLE_LENGTH)
        return f"{_ITERATION_ENDS[name]} {title!r} {one_line(data.get('status'), 30)}{_took(data)}{items}{error}."
    if name == "human_input_required":
        return _waits_for_a_person(data)
    return None


def _waits_for_a_person(data: dict[str, Any]) -> str:
    # Never the form's token: whoever has it can answer the form.
    content = one_line(data.get("form_content") or "", _TITLE_LENGTH)
    form = f", form {content!r}" if content else ""
    return (
        f"The run is paused: it waits for a person at the node {one_line(data.get('node_title'), _TITLE_LENGTH)!r}"
        f"{form}{_expires(data.get('expiration_time'))}."
    )


def _expires(epoch: Any) -> str:
    try:
        moment = datetime.fromtimestamp(epoch, timezone.utc)
    except (TypeError, ValueError, OverflowError, OSError):
        return ""
    return f", which expires at {moment.isoformat(timespec='seconds')}"


def _node(data: dict[str, Any]) -> str:
    title, node_type = (one_line(data.get(name), _TITLE_LENGTH) for name in ("title", "node_type"))
    return f"Node {title!r} ({node_type})"


def _error(data: dict[str, Any]) -> str:
    return one_line(data.get("error") or "Dify gave no error text", 300).rstrip(".")


def _took(data: dict[str, Any]) -> str:
    elapsed = data.get("elapsed_time")
    try:
        return f" after {float(elapsed):.2f} seconds" if isinstance(elapsed, (int, float)) else ""
    except OverflowError:
        return ""


def _text(data: dict[str, Any], name: str) -> str | None:
    value = data.get(name)
    return value if isinstance(value, str) else None


# How often a run that sends no event is looked at, at most, however short the interval is.
SHORTEST_WAIT = 0.25


class Follower:
    """
    Follows one run to its end. The nodes of ``one_of_many``, a batch's, get no lines, and its detail isn't read if the
    events say that it succeeded: that would cost Dify ten queries.
    """

    def __init__(
        self,
        client: DifyClient,
        deadline: Deadline,
        log: Logger,
        arguments: WaitArguments,
        *,
        one_of_many: bool = False,
    ) -> None:
        self.client = client
        self.deadline = deadline
        self.log = log
        self.arguments = arguments
        self.progress = RunProgress(has_lines=not one_of_many)
        # The run as the last event of its stream describes it; None while that is still to come.
        self.ended_run: WorkflowRun | None = None
        # Whether the run's record went on saying that it is not over, so that the events counted.
        self.record_is_open = False
        self._one_of_many = one_of_many
        self._succeeded_run: WorkflowRun | None = None

    async def follow(self, wait: RunWait, stream: AsyncWorkflowRunStream | None) -> tuple[WorkflowRun, Verdict]:
        """
        Follow a run until it is over, and return it and what it means; without a stream by polls alone. Raises a
        DifyWorkflowRunTimeout if the deadline is over (the run was looked at once more then), and any other DifyError
        if the wait can't continue.
        """
        found = await self._follow_events(wait, stream) if stream is not None else None
        found = found or await self._poll_until_over(wait)
        run, verdict = found
        status = self.ended_run.status if self.ended_run is not None else None
        if status and status != run.status:
            self.log.warning(
                "The event stream said %s, the run's detail says %s; the detail decides.",
                one_line(status, 50),
                run.status,
            )
        return run, verdict.because_of(self.progress.failed_node, self.progress.failed_node_facts)

    async def _follow_events(self, wait: RunWait, stream: AsyncWorkflowRunStream) -> tuple[WorkflowRun, Verdict] | None:
        """Log a run's events until the stream ends, or the run itself turns out to be over."""
        interval = self.arguments.poll_interval
        next_look = time.monotonic() + interval
        # An error may be followed by the end of the run.
        ends = math.inf
        try:
            while not self.deadline.is_over and (now := time.monotonic()) < ends:
                seconds = min(max(SHORTEST_WAIT, next_look - now), ends - now)
                event = await stream.next_event(min(seconds, self.deadline.left))
                if event is not None:
                    self.note(event)
                    if event.is_ending:
                        self._on_ending(wait, event)
                        if event.name != ERROR:
                            return None
                        ends = min(ends, now + SECONDS_AFTER_ERROR)
                # A paused run sends nothing but pings, and so does one that hangs.
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + interval
                    if (found := await self._look(wait)) is not None:
                        return found
        except DifyConnectionError as error:
            if ends == math.inf:
                self.log.warning("%s Polling the run every %g seconds instead.", error, interval)
        return None

    def note(self, event: WorkflowEvent) -> None:
        """Take note of an event, and log what deserves a line."""
        line = self.progress.on_event(event)
        if line:
            self.log.info("%s", line)

    def _on_ending(self, wait: RunWait, event: WorkflowEvent) -> None:
        if event.workflow_run_id == wait.workflow_run_id:
            self.ended_run = event.ended_run
            self._succeeded_run = event.succeeded_run if self._one_of_many else None
        if event.name == ERROR:
            self.log.warning(
                "The event stream of workflow run %s ended with the error %s.",
                wait.workflow_run_id,
                one_line(event.data, 300),
            )
        elif event.name != FINISHED:
            self.log.info("Dify paused workflow run %s; polling it until it continues.", wait.workflow_run_id)

    async def _look(self, wait: RunWait) -> tuple[WorkflowRun, Verdict] | None:
        try:
            run = await self.client.perform(calls.run_detail(wait.workflow_run_id))
        except (DifyConnectionError, DifyWorkflowRunNotFound):
            # As long as the stream lives, the run does.
            return None
        verdict = wait.on_poll(run)
        return None if verdict.outcome is Outcome.WAIT else (run, verdict)

    async def _poll_until_over(self, wait: RunWait) -> tuple[WorkflowRun, Verdict]:
        if self._succeeded_run is not None:
            return self._succeeded_run, wait.on_poll(self._succeeded_run)
        poll_interval = self.arguments.poll_interval
        interval = min(1.0, poll_interval) if self.progress.final_status else poll_interval
        # What the events say counts then, if the record still says something else.
        until = time.monotonic() + self.arguments.not_found_grace
        while True:
            is_last = self.deadline.is_over
            found, delay = await self._poll(wait)
            if found is not None:
                return found
            if self.ended_run is not None and (is_last or time.monotonic() >= until):
                return self._take_word_of_events(wait, self.ended_run)
            if is_last:
                raise self.deadline.error(wait.describe_last_status())
            pause = max(interval, delay)
            if self.ended_run is not None:
                pause = min(pause, max(0.0, until - time.monotonic()))
            await self.deadline.pause(pause)
            interval = min(interval * 2, poll_interval)

    async def _poll(self, wait: RunWait) -> tuple[tuple[WorkflowRun, Verdict] | None, float]:
        """Poll once; return what was found if the run is over, and for how many seconds not to poll."""
        try:
            run = await self.client.perform(calls.run_detail(wait.workflow_run_id))
        except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
            if isinstance(error, DifyWorkflowRunNotFound) and self.progress.was_rejected:
                raise self.rejection(wait.workflow_run_id) from error
            if self.ended_run is None:
                wait.on_failed_poll(error)
            return None, delay_after(error, wait.consecutive_failures, RETRY_DELAY)
        verdict = wait.on_poll(run)
        # A record that is not over contradicts the events, if these have ended, however old it is.
        is_open = verdict.outcome is Outcome.WAIT or (verdict.outcome is Outcome.TIMED_OUT and self.ended_run)
        return (None if is_open else (run, verdict)), 0.0

    def _take_word_of_events(self, wait: RunWait, run: WorkflowRun) -> tuple[WorkflowRun, Verdict]:
        """Return a run as its last event describes it: the record did not follow within the grace."""
        self.log.warning(
            "The events of Dify workflow run %s ended as %s, which counts although its record does not say so. %s",
            run.id,
            run.status,
            wait.describe_last_status(),
        )
        self.record_is_open = wait.status in WAITING_STATUSES
        return run, wait.on_poll(run)

    def rejection(self, workflow_run_id: str) -> DifyInputsRejected:
        """Return the error for a run that Dify named and rejected."""
        return DifyInputsRejected(
            f"{one_line(self.progress.final_error or 'Dify gave no error text').rstrip('.')}. Dify rejected the inputs "
            f"and keeps no record of the run (it named it {workflow_run_id}). Check the task's inputs.",
            server_version=self.client.server_version,
        )
