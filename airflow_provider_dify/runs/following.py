"""A start, and a run, followed to its end: what is asked and read, for how long, and what it means. No I/O."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import SendStart, Steps
from airflow_provider_dify.api.events import ERROR, FINISHED, WorkflowEvent
from airflow_provider_dify.api.models import WAITING_STATUSES, WorkflowRun
from airflow_provider_dify.api.started_run import (
    SECONDS_AFTER_ERROR,
    NextEvent,
    StartedRun,
    read_after_error,
    wait_until_accepted,
)
from airflow_provider_dify.api.text import one_line
from airflow_provider_dify.exceptions import (
    DifyConnectionError,
    DifyError,
    DifyInputsRejected,
    DifyRequestError,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
    DifyWorkflowRunUncertain,
)
from airflow_provider_dify.runs.clock import TaskClock
from airflow_provider_dify.runs.inputs import check_inputs, parse_input_form
from airflow_provider_dify.runs.log import RETRY_DELAY, RepeatedLook, RunSearch, find_run, runs_queue
from airflow_provider_dify.runs.progress import RunProgress
from airflow_provider_dify.runs.verdict import Outcome, Verdict
from airflow_provider_dify.runs.waiting import LIFE_INTERVAL, MAX_RETRY_DELAY, RunWait, delay_after

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

# How often the log is looked at while a start is queued, in case the connection is dead without a sign of it.
QUEUE_INTERVAL = 30.0
# The rejection of a run follows its start at once (measured on 1.15.0 and 1.16.1: 0.07 seconds).
REJECTION_SECONDS = 5.0
# Some servers write runs late.
NOT_FOUND_GRACE = 60.0
# A log that can't be read is asked for so many times the grace: what failed proves nothing.
_GRACES_THROUGH_FAILURES = 10
# How often a run that sends no event is looked at, at most, however short the interval is.
_SHORTEST_WAIT = 0.25


class Server(Protocol):
    """What is known of the server, by a hook: its version, once it has responded, and how long a response may take."""

    server_version: str | None

    @property
    def response_timeout(self) -> float:
        """Seconds for a whole response."""


class Follower:
    """
    Follows one try's start and run, in :data:`~airflow_provider_dify.api.calls.Steps` that a hook takes.

    :param hook: the hook, which sends nothing again by itself.
    :param clock: the try's deadline.
    :param log: the task's log.
    :param poll_interval: seconds between polls.
    :param whose: whose timeout it is, for messages.
    :param not_found_grace: seconds for which a run is looked for that may have been started.
    :ivar last_look_failed: whether the last look of the last search into Dify's log failed.
    :ivar log_shows_no_run: whether that search, of which no look failed, found no run.
    :ivar ended_run: the run as the last event of its stream describes it; ``None`` while that is still to come.
    :ivar record_is_open: whether the run's record went on saying that it is not over, so that the events counted.
    """

    # How often a start is sent again that did not reach Dify; one that Dify has no room for, until the deadline.
    start_retries = 3

    def __init__(
        self,
        hook: Server,
        clock: TaskClock,
        log: Logger,
        poll_interval: float,
        whose: str = "operator's",
        not_found_grace: float = NOT_FOUND_GRACE,
    ) -> None:
        self.whose = whose
        self.not_found_grace = not_found_grace
        self.last_look_failed = False
        self.log_shows_no_run = False
        self.hook = hook
        self.clock = clock
        self.log = log
        self.poll_interval = poll_interval
        self.progress = RunProgress()
        # Called around each attempt of a start: what is about to be sent must leave a trace, and one that started
        # nothing must leave none.
        self.before_send: Callable[[], None] = lambda: None
        self.after_refusal: Callable[[], None] = lambda: None
        # The start under way, which a signal's handler may have to look at.
        self.stream: StartedRun | None = None
        self._next_line = 0.0
        self.ended_run: WorkflowRun | None = None
        self.record_is_open = False

    def check_inputs(self, inputs: Mapping[str, Any]) -> Steps[None]:
        """
        Check inputs against the app's form, before a start.

        :param inputs: the workflow's inputs.
        :raises DifyInputsRejected: if Dify is sure to reject them.
        :raises DifyAuthenticationError: if the API key is refused.
        """
        try:
            form = parse_input_form((yield calls.parameters()))
        except DifyError:
            # A server that refuses the form leaves the check out; the start tells what else is wrong.
            return
        check = check_inputs(form, inputs)
        for warning in check.warnings:
            self.log.warning("%s", warning)
        if (rejection := check.rejection(self.hook.server_version)) is not None:
            raise rejection

    def send_start(self, inputs: Mapping[str, Any], user: str, workflow_id: str | None) -> Steps[StartedRun]:
        """
        Send a start until Dify accepts it, again only where nothing can have started.

        :return: the start, whose event stream has begun.
        :raises DifyError: as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.start_workflow_run` does.
        """
        failures = 0
        while True:
            self.clock.check()
            self.before_send()
            stream: StartedRun = yield SendStart(inputs, user, workflow_id)
            self.stream = stream
            try:
                yield from self._wait_until_accepted(stream, user)
                self.hook.server_version = stream.server_version or self.hook.server_version
                return stream
            except DifyConnectionError as error:
                stream.close()
                self.stream = None
                self.after_refusal()
                failures += 1
                yield from self.before_next_start(error, failures)
            except BaseException:
                stream.close()
                raise

    def before_next_start(self, error: DifyConnectionError, failures: int) -> Steps[None]:
        """
        Pause after a start that started nothing.

        :param error: why it didn't.
        :param failures: failures in a row, this one included.
        :raises DifyConnectionError: the error, if the start is not to be sent again.
        """
        delay = delay_after(error, failures, RETRY_DELAY)
        is_given_up = (error.retry_after or 0.0) > MAX_RETRY_DELAY or delay >= self.clock.left
        if is_given_up or (failures > self.start_retries and not error.is_overloaded):
            raise error
        reason = "Dify has too many active runs" if error.is_overloaded else "The start did not reach Dify"
        self.log.warning("%s; the next attempt is in %.1f seconds: %s", reason, delay, error)
        yield from self.clock.pause(delay)

    def wait_until_named(self, stream: StartedRun, search: RunSearch, seconds: float) -> Steps[str | None]:
        """
        Wait until Dify names the run of a start: on its stream, and now and then in the log.

        :param stream: the start, accepted.
        :param search: what is known of the run.
        :param seconds: how long to wait.
        :return: the run's id; ``None`` if it is still queued then.
        :raises DifyInputsRejected: if Dify rejects the inputs.
        :raises DifyWorkflowRunFailed: if Dify says that it failed to start the run.
        :raises DifyWorkflowRunUncertain: if the stream ends before.
        """
        began = time.monotonic()
        next_look = began + QUEUE_INTERVAL
        others: set[str] = set()
        while not self.clock.is_over and (left := seconds - (time.monotonic() - began)) > 0:
            seconds_to_look = max(_SHORTEST_WAIT, next_look - time.monotonic())
            event = yield NextEvent(stream, self.clock.slice_of(min(left, seconds_to_look)))
            if stream.is_named:
                yield from self._on_started(stream, event)
                return stream.workflow_run_id
            self.clock.check()
            if stream.error_event is not None:
                return (yield from self._on_error_event(stream, search))
            if time.monotonic() >= next_look:
                next_look = time.monotonic() + QUEUE_INTERVAL
                self.log.info(
                    "The workflow run of user %r is queued at Dify for %.0f seconds: its workers are busy, or none of "
                    "them takes from this queue.",
                    search.user,
                    time.monotonic() - began,
                )
                if run_id := (yield from self._look_into_log(search, others)):
                    return run_id
        return None

    def search_run(
        self,
        search: RunSearch,
        error: DifyError,
        seconds: float,
        through_failures: float | None = None,
        *,
        patience: float = 0.0,
    ) -> Steps[str | None]:
        """
        Look for the run of a start in Dify's log, until it is there.

        :param search: what is known of it.
        :param error: why no id came back.
        :param seconds: how long to look.
        :param through_failures: how long to look while the log can't be read; ten times as long by default.
        :param patience: as for :func:`~airflow_provider_dify.runs.log.find_run`.
        :return: the run's id; ``None`` if the time is over.
        :raises DifyWorkflowRunUncertain: if several runs fit, or the log can't be read at all.
        """
        began = time.monotonic()
        others: set[str] = set()
        was_away = False
        self.log_shows_no_run = False
        limit = seconds * _GRACES_THROUGH_FAILURES if through_failures is None else through_failures

        def look() -> Steps[str | None]:
            try:
                run_id = yield from find_run(search, others, patience=patience)
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
                self.log.info(line, search.user, time.time() - search.sent_at)
            return run_id

        def seconds_left(has_failed: bool) -> float:
            nonlocal was_away
            self.last_look_failed = has_failed
            was_away = was_away or has_failed
            return (max(seconds, limit) if has_failed else seconds) - (time.monotonic() - began)

        looks = RepeatedLook(self.clock, self.log, self.poll_interval)
        run_id = yield from looks.until_found(look, seconds_left)
        self.log_shows_no_run = run_id is None and not was_away
        return run_id

    def may_be_queued(self) -> bool:
        """Return whether the server may hold a start back without a record of it."""
        return runs_queue(self.hook.server_version)

    def is_in_queue(self) -> bool:
        """Return whether the start under way was accepted by a server that may have queued it."""
        return self.stream is not None and self.stream.is_accepted and self.may_be_queued()

    def follow(self, wait: RunWait, stream: StartedRun | None, timeout: float) -> Steps[tuple[WorkflowRun, Verdict]]:
        """
        Follow a run until it is over: its events, then polls.

        :param wait: the wait on the run.
        :param stream: the run's events; ``None`` for a run that another process started.
        :param timeout: the operator's ``timeout``, for the message.
        :return: the run, and what it means.
        :raises DifyWorkflowRunTimeout: if the deadline is over; the run was looked at once more then.
        :raises DifyError: if the wait can't go on.
        """
        found = (yield from self._follow_events(wait, stream)) if stream is not None else None
        interval = min(1.0, self.poll_interval) if self.progress.final_status else self.poll_interval
        # What the events say counts then, if the record still says something else.
        until = time.monotonic() + wait.policy.not_found_grace
        while found is None:
            is_last = self.clock.is_over
            found, delay = yield from self._poll(wait)
            if found is None and self.ended_run is not None and (is_last or time.monotonic() >= until):
                found = self._take_word_of_events(wait, self.ended_run)
            if found is None and is_last:
                raise DifyWorkflowRunTimeout(
                    f"The {self.whose} timeout of {timeout:g} seconds is over. {wait.describe_last_status()}"
                )
            if found is None:
                pause = max(interval, delay)
                left = until - time.monotonic()
                yield from self.clock.pause(min(pause, max(0.0, left)) if self.ended_run is not None else pause)
                interval = min(interval * 2, self.poll_interval)
        run, verdict = found
        status = self.ended_run.status if self.ended_run is not None else None
        if status and status != run.status:
            self.log.warning(
                "The event stream said %s, the run's detail says %s; the detail decides.",
                one_line(status, 50),
                run.status,
            )
        return run, verdict.because_of(self.progress.failed_node)

    def _wait_until_accepted(self, stream: StartedRun, user: str) -> Steps[None]:
        until = time.monotonic() + self.hook.response_timeout
        while (left := until - time.monotonic()) > 0 and not self.clock.is_over:
            if (yield from wait_until_accepted(stream, self.clock.slice_of(left))):
                return
            self.clock.check()
        raise DifyWorkflowRunUncertain(
            f"No response within {self.hook.response_timeout:g} seconds: Dify may or may not have started a "
            f"workflow run for user {user!r}. It was not asked again, so as not to pay twice. Look for the user in the "
            "app's log in Dify's console.",
            user=user,
        )

    def _on_started(self, stream: StartedRun, event: WorkflowEvent | None) -> Steps[None]:
        if stream.task_id != stream.workflow_run_id:
            return
        self.progress.was_rejected = True
        if event is not None:
            self._note(event)
        following: WorkflowEvent | None = None
        with suppress(DifyConnectionError):
            following = yield NextEvent(stream, min(REJECTION_SECONDS, max(1.0, self.clock.left)))
        if following is not None:
            self._note(following)
        if self.progress.was_rejected:
            raise stream.rejection() or self._rejection(stream.workflow_run_id)

    def _on_error_event(self, stream: StartedRun, search: RunSearch) -> Steps[str | None]:
        """Return the run's id, if there is one all the same; else raise what Dify said before the run had a name."""
        yield from read_after_error(stream)
        error = stream.rejection()
        assert error is not None  # noqa: S101
        if stream.is_named:
            self.log.warning("%s", error)
            yield from self._on_started(stream, None)
            return stream.workflow_run_id
        run_id = None
        if not isinstance(error, DifyRequestError):
            with suppress(DifyWorkflowRunUncertain):
                run_id = yield from self.search_run(search, error, 0.0, self.not_found_grace)
        if run_id is None:
            stream.close()
            raise error
        return run_id

    def _rejection(self, workflow_run_id: str) -> DifyInputsRejected:
        return DifyInputsRejected(
            f"{one_line(self.progress.final_error or 'Dify gave no error text').rstrip('.')}. Dify rejected the inputs "
            f"and keeps no record of the run (it named it {workflow_run_id}). Check the task's inputs.",
            server_version=self.hook.server_version,
        )

    def _look_into_log(self, search: RunSearch, others: set[str]) -> Steps[str | None]:
        try:
            return (yield from find_run(search, others))
        except DifyWorkflowRunUncertain:
            raise
        except DifyError as error:
            self.log.warning("Dify's log could not be read while the run is queued: %s", error)
            return None

    def _note(self, event: WorkflowEvent) -> None:
        line = self.progress.on_event(event)
        if line:
            self.log.info("%s", line)

    def _follow_events(self, wait: RunWait, stream: StartedRun) -> Steps[tuple[WorkflowRun, Verdict] | None]:
        """Log a run's events until the stream ends, or the run itself turns out to be over."""
        next_look = time.monotonic() + self.poll_interval
        # An error may be followed by the end of the run.
        ends = math.inf
        try:
            while not self.clock.is_over and (now := time.monotonic()) < ends:
                seconds = min(max(_SHORTEST_WAIT, next_look - now), ends - now)
                event = yield NextEvent(stream, self.clock.slice_of(seconds))
                self.clock.check()
                if event is not None:
                    self._note(event)
                    if event.is_ending:
                        self._on_ending(wait, event)
                        if event.name != ERROR:
                            return None
                        ends = min(ends, now + SECONDS_AFTER_ERROR)
                # A paused run sends nothing but pings, and so does one that hangs.
                if time.monotonic() >= next_look:
                    next_look = time.monotonic() + self.poll_interval
                    if (found := (yield from self._look(wait))) is not None:
                        return found
        except DifyConnectionError as error:
            if ends == math.inf:
                self.log.warning("%s Polling the run every %g seconds instead.", error, self.poll_interval)
        return None

    def _on_ending(self, wait: RunWait, event: WorkflowEvent) -> None:
        if event.workflow_run_id == wait.workflow_run_id:
            self.ended_run = event.ended_run
        if event.name == ERROR:
            self.log.warning(
                "The event stream of workflow run %s ended with the error %s.",
                wait.workflow_run_id,
                one_line(event.data, 300),
            )
        elif event.name != FINISHED:
            self.log.info("Dify paused workflow run %s; polling it until it goes on.", wait.workflow_run_id)

    def _look(self, wait: RunWait) -> Steps[tuple[WorkflowRun, Verdict] | None]:
        try:
            run = yield from calls.look_up_run(wait.workflow_run_id)
        except (DifyConnectionError, DifyWorkflowRunNotFound):
            # As long as the stream lives, the run does.
            return None
        verdict = wait.on_poll(run)
        return None if verdict.outcome is Outcome.WAIT else (run, verdict)

    def _poll(self, wait: RunWait) -> Steps[tuple[tuple[WorkflowRun, Verdict] | None, float]]:
        """Poll once; return what was found if the run is over, and how long not to poll."""
        try:
            run = yield from calls.look_up_run(wait.workflow_run_id)
        except (DifyConnectionError, DifyWorkflowRunNotFound) as error:
            if isinstance(error, DifyWorkflowRunNotFound) and self.progress.was_rejected:
                raise self._rejection(wait.workflow_run_id) from error
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
