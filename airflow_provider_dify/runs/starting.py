# SPDX-License-Identifier: Apache-2.0
"""A run started and named: sent again only where none can have started, else looked for in Dify's log."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

from airflow_provider_dify.api.events import WorkflowEvent
from airflow_provider_dify.api.models import WorkflowRun, is_server_from
from airflow_provider_dify.api.run_stream import NO_EXTRAS, AsyncWorkflowRunStream, StartExtras
from airflow_provider_dify.exceptions import (
    MAX_RETRY_DELAY,
    DifyConnectionError,
    DifyError,
    DifyRequestError,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.following import SHORTEST_WAIT, Follower
from airflow_provider_dify.runs.inputs import InputForm, check_inputs, read_form
from airflow_provider_dify.runs.log import (
    RETRY_DELAY,
    RunSearch,
    before_start,
    delay_after,
    find_run,
    fingerprint,
    looking_again,
    until,
)
from airflow_provider_dify.runs.uploads import look_at_files, upload_inputs
from airflow_provider_dify.runs.waiting import LIFE_INTERVAL, RunWait

# How often the log is looked at while a start is queued, in case the connection is dead without a sign of it.
QUEUE_INTERVAL = 30.0
# The rejection of a run follows its start at once (measured on 1.15.0 and 1.16.1: 0.07 seconds).
REJECTION_SECONDS = 5.0
# A log that can't be read is asked for so many times the grace: what failed proves nothing.
_GRACES_THROUGH_FAILURES = 10


class Starter(Follower):
    """Starts one run, and follows it to its end."""

    # How often a start is sent again that did not reach Dify; one that Dify has no room for, until the deadline.
    start_retries = 3
    # Called before each attempt of a start: what is about to be sent must leave a trace.
    before_send: Callable[[], Awaitable[None]] | None = None
    # Called after each attempt that started nothing: it must leave no trace.
    after_refusal: Callable[[], Awaitable[None]] | None = None
    # Waits until Dify may have room for one run more; a pause that grows, by default.
    wait_for_room: Callable[[DifyConnectionError], Awaitable[None]] | None = None
    # What goes along with the start.
    extras: StartExtras = NO_EXTRAS
    # The start under way, and its run's events.
    stream: AsyncWorkflowRunStream | None = None
    # The app's form, once it was read.
    form: InputForm | None = None
    # Counts the files that were uploaded, and their bytes.
    uploaded: Counter[str] | None = None
    # Of the last search into Dify's log: whether its last look failed, and whether none did and there was no run.
    last_look_failed = False
    log_shows_no_run = False
    _next_line = 0.0

    @property
    def named_stream(self) -> AsyncWorkflowRunStream | None:
        """The events of the run that was started; ``None`` if its stream has not named it."""
        return self.stream if self.stream is not None and self.stream.is_named else None

    @property
    def may_be_queued(self) -> bool:
        """Whether the server may hold a start back without a record of it; 1.13 and later do, an unknown one may."""
        return is_server_from(self.client.server_version, (1, 13)) is not False

    @property
    def is_in_queue(self) -> bool:
        """Whether the start under way was accepted by a server that may have queued it."""
        return self.stream is not None and self.stream.is_accepted and self.may_be_queued

    def known(self, search: RunSearch) -> RunSearch:
        """Return what is known of the run of the start under way: where the response named it, its id, too."""
        run_id = self.stream.workflow_run_id if self.stream is not None else ""
        return replace(search, announced_id=run_id) if run_id else search

    def close(self) -> None:
        """Hang up; the run continues."""
        if self.stream is not None:
            self.stream.close()

    async def run(
        self, inputs: Mapping[str, Any], user: str, workflow_id: str | None, extras: StartExtras = NO_EXTRAS
    ) -> WorkflowRun:
        """Start a run and follow it until it is over; return it, whatever its status."""
        self.extras = extras
        await look_at_files(inputs)
        before, sent_at = await before_start(self.client, user)
        search = RunSearch(user, sent_at, user_is_unique=False, fingerprint=fingerprint(inputs), known_runs=before)
        try:
            run_id = await self.start_and_name(inputs, workflow_id, search)
            wait = RunWait(run_id, self.arguments, log=self.log, was_seen=True)
            run, _ = await self.follow(wait, self.named_stream)
            return run
        finally:
            self.close()

    async def check_inputs(self, inputs: Mapping[str, Any]) -> None:
        """Check inputs against the app's form; raises a DifyInputsRejected if Dify is sure to reject them."""
        form = self.form = await read_form(self.client)
        if form is None:
            return
        check = check_inputs(form, inputs)
        for warning in check.warnings:
            self.log.warning("%s", warning)
        if (rejection := check.rejection(self.client.server_version)) is not None:
            raise rejection

    async def start_and_name(self, inputs: Mapping[str, Any], workflow_id: str | None, search: RunSearch) -> str:
        """
        Start a run, wait until it has a name (on its stream, or in Dify's log), and return the run's id. Raises a
        DifyWorkflowRunUncertain if it has none in time, and any other DifyError as :meth:`send_start` does.
        """
        try:
            stream = await self.send_start(inputs, search.user, workflow_id)
            run_id = await self.wait_until_named(stream, search, self.deadline.left)
        except DifyWorkflowRunUncertain as error:
            self.log.warning("%s", error)
            # One that was accepted may be queued for as long as it likes.
            seconds = self.deadline.left if self.is_in_queue else self.arguments.not_found_grace
            run_id = await self.search_run(search, error, seconds)
            if run_id is None:
                raise
        if run_id is None:
            raise self.still_queued(search.user)
        return run_id

    async def send_start(self, inputs: Mapping[str, Any], user: str, workflow_id: str | None) -> AsyncWorkflowRunStream:
        """
        Send a start until Dify accepts it, again only where nothing can have started; return it with its event stream,
        or raise as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.start_workflow_run` does.
        """
        failures = 0
        more: Any = {"form": self.form, "deadline": self.deadline, "log": self.log, "counter": self.uploaded}
        # Once for all attempts.
        inputs = await upload_inputs(self.client, inputs, user, workflow_id, **more)
        while True:
            try:
                return await self.client.with_current_key(lambda: self._send_once(inputs, user, workflow_id))
            except DifyConnectionError as error:  # noqa: PERF203
                if self.after_refusal is not None:
                    await self.after_refusal()
                failures += 1
                await self._before_next_start(error, failures)

    async def _send_once(self, inputs: Mapping[str, Any], user: str, workflow_id: str | None) -> AsyncWorkflowRunStream:
        if self.before_send is not None:
            await self.before_send()
        stream = self.stream = self.client.send_start(inputs, user, workflow_id, self.extras)
        try:
            await self._wait_until_accepted(stream, user)
        except DifyConnectionError:
            stream.close()
            self.stream = None
            raise
        except DifyError:
            stream.close()
            raise
        self.client.server_version = stream.server_version or self.client.server_version
        return stream

    async def _wait_until_accepted(self, stream: AsyncWorkflowRunStream, user: str) -> None:
        seconds = min(self.client.response_timeout, self.deadline.left)
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if await stream.wait_until_accepted(left):
                return
        raise DifyWorkflowRunUncertain(
            f"No response within {seconds:.3g} seconds: Dify may or may not have started a workflow run for user "
            f"{user!r}. It was not asked again, so as not to pay twice. Look for the user in the app's log in Dify's "
            "console.",
            user=user,
        )

    async def _before_next_start(self, error: DifyConnectionError, failures: int) -> None:
        """Pause after a start that started nothing; raise the error if the start is not to be sent again."""
        if error.is_overloaded and self.wait_for_room is not None:
            await self.wait_for_room(error)
            return
        delay = delay_after(error, failures, RETRY_DELAY)
        is_given_up = (error.retry_after or 0.0) > MAX_RETRY_DELAY or delay >= self.deadline.left
        if is_given_up or (failures > self.start_retries and not error.is_overloaded):
            raise error
        reason = "Dify has too many active runs" if error.is_overloaded else "The start did not reach Dify"
        self.log.warning("%s; the next attempt is in %.1f seconds: %s", reason, delay, error)
        await self.deadline.pause(delay)

    async def wait_until_named(self, stream: AsyncWorkflowRunStream, search: RunSearch, seconds: float) -> str | None:
        """
        Wait until Dify names the run of a start, on its stream, and now and then in the log; return its id, ``None`` if
        it is still queued then. Raises what Dify says of a start that it rejects or fails, and a
        DifyWorkflowRunUncertain if the stream ends before.
        """
        search, began = self.known(search), time.monotonic()
        next_look = began + QUEUE_INTERVAL
        others: set[str] = set()
        while (left := min(seconds - (time.monotonic() - began), self.deadline.left)) > 0:
            event = await stream.next_event(min(left, max(SHORTEST_WAIT, next_look - time.monotonic())))
            if stream.is_named:
                await self._on_named(stream, event)
                return stream.workflow_run_id
            if stream.error_event is not None:
                return await self._on_error_event(stream, search)
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + QUEUE_INTERVAL
                self.log.info(
                    "The workflow run of user %r is queued at Dify for %.0f seconds: its workers are busy, or none of "
                    "them takes from this queue.",
                    search.user,
                    time.monotonic() - began,
                )
                if run_id := await self._look_into_log(search, others):
                    return run_id
        return None

    async def _on_named(self, stream: AsyncWorkflowRunStream, event: WorkflowEvent | None) -> None:
        """Raise if the run is one that Dify rejects, whose two ids are the same."""
        if stream.task_id != stream.workflow_run_id:
            return
        self.progress.was_rejected = True
        if event is not None:
            self.note(event)
        following: WorkflowEvent | None = None
        with suppress(DifyConnectionError):
            following = await stream.next_event(min(REJECTION_SECONDS, max(1.0, self.deadline.left)))
        if following is not None:
            self.note(following)
        if self.progress.was_rejected:
            raise stream.rejection() or self.rejection(stream.workflow_run_id)

    async def _on_error_event(self, stream: AsyncWorkflowRunStream, search: RunSearch) -> str | None:
        """Return the run's id, if there is one all the same; else raise what Dify said before the run had a name."""
        await stream.read_after_error()
        error = stream.rejection()
        assert error is not None  # noqa: S101
        if stream.is_named:
            self.log.warning("%s", error)
            await self._on_named(stream, None)
            return stream.workflow_run_id
        run_id = None
        if not isinstance(error, DifyRequestError):
            with suppress(DifyWorkflowRunUncertain):
                run_id = await self.search_run(search, error, 0.0, self.arguments.not_found_grace)
        if run_id is None:
            stream.close()
            raise error
        return run_id

    async def _look_into_log(self, search: RunSearch, others: set[str]) -> str | None:
        try:
            return await find_run(self.client, search, others)
        except DifyWorkflowRunUncertain:
            raise
        except DifyError as error:
            self.log.warning("Dify's log could not be read while the run is queued: %s", error)
            return None

    async def search_run(
        self,
        search: RunSearch,
        error: DifyError,
        seconds: float,
        through_failures_seconds: float | None = None,
        *,
        patience_seconds: float = 0.0,
    ) -> str | None:
        """
        Look for the run of a start in Dify's log until it is there (ten times as long, by default, while the log can't
        be read); return its id, ``None`` if the time is over. ``error`` says why no id came back. Raises a
        DifyWorkflowRunUncertain if several runs fit, or the log can't be read at all.
        """
        search, began = self.known(search), time.monotonic()
        others: set[str] = set()
        was_away = False
        self.log_shows_no_run = False
        limit = seconds * _GRACES_THROUGH_FAILURES if through_failures_seconds is None else through_failures_seconds

        async def look() -> str | None:
            try:
                run_id = await find_run(self.client, search, others, patience_seconds=patience_seconds)
            except (DifyConnectionError, DifyWorkflowRunUncertain):
                raise
            except DifyError as failure:
                raise DifyWorkflowRunUncertain(
                    f"{error} The log could not be read: {failure}", user=search.user
                ) from None
            if run_id is not None:
                self.log.info("Dify's log names the run: workflow run %s.", run_id)
            elif time.monotonic() >= self._next_line:
                self._next_line = time.monotonic() + LIFE_INTERVAL
                line = "Dify's log has no run of user %r yet, %.0f seconds after the start."
                self.log.info(line, search.user, max(0.0, time.time() - search.sent_at))
            return run_id

        def seconds_left(has_failed: bool) -> float:
            nonlocal was_away
            self.last_look_failed = has_failed
            was_away = was_away or has_failed
            return (max(seconds, limit) if has_failed else seconds) - (time.monotonic() - began)

        # A failure that got out would have Airflow retry, and the retry start another run.
        on_failure, interval = looking_again(self.log), self.arguments.poll_interval
        run_id = await until(look, self.deadline, on_failure, interval_seconds=interval, seconds_left=seconds_left)
        self.log_shows_no_run = run_id is None and not was_away
        return run_id

    def still_queued(self, user: str) -> DifyWorkflowRunUncertain:
        """Return the error for a run that is still queued when the time is over."""
        return DifyWorkflowRunUncertain(
            f"The {self.deadline.whose} timeout is over, and the workflow run of user {user!r} is still queued at "
            "Dify, which cannot be asked to drop it: it will run, and be paid for, once. Look for the user in the "
            "app's log in Dify's console.",
            user=user,
        )
