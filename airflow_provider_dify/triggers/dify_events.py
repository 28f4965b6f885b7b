# SPDX-License-Identifier: Apache-2.0
"""Trigger Dags when workflow runs of a Dify app end, whoever started them (Airflow 3.0 and later)."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

try:
    from airflow.triggers.base import BaseEventTrigger, TriggerEvent
except ImportError:
    raise ImportError(
        "DifyWorkflowRunsTrigger needs Airflow 3.0 or later: Airflow 2 starts no Dag on an event. Use "
        "DifyLatestWorkflowRunSensor in a task."
    ) from None

from airflow_provider_dify.airflow_versions import EVENT_TRIGGERS_HAVE_QUEUES, asset_state_of, may_batch_events
from airflow_provider_dify.api import calls
from airflow_provider_dify.api.models import digest_of
from airflow_provider_dify.exceptions import (
    MAX_RETRY_DELAY,
    TRIGGERER_SECTION,
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyError,
    DifyRequestError,
)
from airflow_provider_dify.runs.ended import Look, RunWindow, WindowPolicy, look_at_runs
from airflow_provider_dify.runs.log import delay_after
from airflow_provider_dify.runs.wanted import RunFilter
from airflow_provider_dify.tasks.arguments import parse_seconds

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from airflow_provider_dify.hooks.dify_async import SharedReading

# Seconds between two lines of a trigger that can't work: it has no task that could fail.
COMPLAINT_INTERVAL = 60.0
# The windows of triggers that have no asset state store: kept while the triggerer's process lives.
_windows: dict[str, RunWindow] = {}


class DifyWorkflowRunsTrigger(BaseEventTrigger):
    """
    Watch the log of a Dify app, and send one event for each workflow run that ended, whoever started it.

    For an ``AssetWatcher``::

        runs = DifyWorkflowRunsTrigger(dify_conn_id="dify_default", statuses=["succeeded"])
        summaries = Asset("dify_summaries", watchers=[AssetWatcher(name="runs", trigger=runs)])


        @dag(schedule=[summaries])
        def use_summaries(): ...

    An event's payload holds ``workflow_run_id, status, user, triggered_from, total_tokens, elapsed_time, created_at,
    finished_at`` (times as ISO 8601 text), never outputs: read them by
    :meth:`~airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run`. Airflow may start one Dag run for several
    events; each is among its ``triggering_asset_events``.

    Each run is sent at least once. The first look takes what has ended so far as known (see ``lookback``). From
    Airflow 3.3.2 on, what is known is kept in the asset's state store: the trigger continues where it stopped, and
    after a triggerer was killed it repeats what it sent in the last seconds. Before that, it is kept in the triggerer's
    process: a restart takes what ended in between as known, or repeats runs, as ``lookback`` says. What may be missed
    at any time: a run whose row comes into Dify's log more than 5 seconds after a younger one; one that ends later
    than ``run_timeout`` says; one of more than 100 that began in the same second; and one that began before the first
    look and stood behind 60 newer ones then.

    A trigger that can't work (Dify away, key refused, connection missing) logs that once a minute, and keeps trying.

    :param dify_conn_id: the Airflow connection of type ``dify``, with an API key of a workflow app.
    :param statuses: only runs that ended so: ``succeeded``, ``partial-succeeded``, ``failed``, ``stopped``. Any end by
        default.
    :param triggered_from: only runs that were started so: ``app-run`` (API and web app), ``webhook``, ``schedule``,
        ``plugin``; one or several.
    :param user: only runs of this ``user`` of the API; ``nightly-*`` for all users that begin with ``nightly-``.
    :param poll_interval: seconds (or a ``timedelta``) between two looks.
    :param run_timeout: seconds (or a ``timedelta``) since a run's creation after which it is no longer watched, with a
        warning; for runs that Dify leaves ``running`` for ever. Seven days by default.
    :param lookback: seconds (or a ``timedelta``) before the first look from which runs that have ended are sent, too. 0
        by default.
    :param queue: the queue of the triggerers that watch (``airflow triggerer --queues``; Airflow 3.4 and later). Any
        triggerer without queues by default.
    :raises DifyConfigurationError: if an argument can't work.
    """

    # Seconds after the first failed look; doubled with each further one.
    retry_delay = 1.0
    # Seconds that Airflow gets to store events before the trigger stores that it has sent them.
    settle_delay = 3.0
    # Seconds from an event to the last one of a look: the scheduler gets them to make a Dag run of those before.
    scheduler_delay = 10.0

    def __init__(
        self,
        dify_conn_id: str = "dify_default",
        statuses: Sequence[str] | None = None,
        triggered_from: str | Sequence[str] | None = None,
        user: str | None = None,
        poll_interval: timedelta | float = 30,
        run_timeout: timedelta | float = 604_800,
        lookback: timedelta | float = 0,
        *,
        queue: str | None = None,
    ) -> None:
        if queue is not None and not EVENT_TRIGGERS_HAVE_QUEUES:
            raise DifyConfigurationError("queue needs Airflow 3.4 or later.")
        super().__init__(**({} if queue is None else {"queue": queue}))  # type: ignore[no-untyped-call]
        self.dify_conn_id = dify_conn_id
        self.filter = RunFilter.parse(statuses=statuses, triggered_from=triggered_from, user=user)
        self.policy = WindowPolicy(
            poll_interval=parse_seconds("poll_interval", poll_interval),
            run_timeout=parse_seconds("run_timeout", run_timeout),
            lookback=parse_seconds("lookback", lookback),
        )
        if self.policy.poll_interval < 1:
            raise DifyConfigurationError(f"poll_interval must be 1 second or more: {poll_interval!r:.100}")
        self._failures = 0
        self._next_complaint = 0.0
        self._is_checked = False
        self._is_filter_checked = False
        self._last_event: float | None = None

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments: JSON-ready values only, and no secret."""
        queue = getattr(self, "queue", None)
        return (
            "airflow_provider_dify.triggers.dify_events.DifyWorkflowRunsTrigger",
            {
                "dify_conn_id": self.dify_conn_id,
                **self.filter.serialize(),
                "poll_interval": self.policy.poll_interval,
                "run_timeout": self.policy.run_timeout,
                "lookback": self.policy.lookback,
                # Here too, because Airflow takes a trigger for another one by its arguments only.
                **({"queue": queue} if queue else {}),
            },
        )

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Look again and again, and yield an event for each run that has ended; never ends by itself."""
        # Imported in a thread, because the HTTP client takes a while to load and others run on this loop.
        reading: SharedReading = (await asyncio.to_thread(_load_reading)).join(self.dify_conn_id)
        try:
            window: RunWindow | None = None
            stored: RunWindow | None = None
            while True:
                delay = 0.0
                try:
                    if window is None:
                        window = stored = await self._load()
                    look = await self._look(reading, window)
                except Exception as error:
                    delay = self._on_failure(error)
                else:
                    delay = self._on_look(look)
                    window = look.window
                    sent = [run for run in look.finished if self.filter.fits(run)]
                    for number, run in enumerate(sent, start=1):
                        if number == len(sent):
                            await asyncio.sleep(self._delay_of_last_event(number))
                        yield TriggerEvent(run.as_event())  # type: ignore[no-untyped-call]
                        self._last_event = time.monotonic()
                    if window != stored:
                        # What has been sent may only be forgotten once Airflow has it.
                        await asyncio.sleep(self.settle_delay if sent else 0)
                        stored = await self._save(window, stored)
                await asyncio.sleep(max(delay, self._until_next_look(time.time())))
        finally:
            await reading.leave()

    async def _look(self, reading: SharedReading, window: RunWindow) -> Look:
        if not self._is_checked:
            await self._check_app(reading)
            self._is_checked = True
        return await look_at_runs(reading, window, self.policy, time.time())

    async def _check_app(self, reading: SharedReading) -> None:
        """Check that the app is of a kind that has a log: that of a chatflow is empty, whatever runs."""
        try:
            app = await reading.perform(calls.app_info())
        except DifyAuthenticationError:
            raise
        except DifyRequestError:
            # A server that doesn't say.
            return
        if app.mode is not None and app.mode != "workflow":
            raise DifyConfigurationError(
                f"The API key of connection {self.dify_conn_id!r} belongs to an app of the mode {app.mode!r:.50}. Dify "
                "keeps a log of runs for apps of the mode 'workflow' only."
            ).explained_in(TRIGGERER_SECTION)

    def _delay_of_last_event(self, count: int) -> float:
        """Return the seconds before the last of so many events of a look may be sent."""
        # A Dag run takes events up to the moment at which Airflow queued it, which is that of the first event. One that
        # comes after, and before the scheduler has made the Dag run, waits until another one comes (Airflow 3.0 to
        # 3.3.2). So the last one must come when the scheduler is done with the first, and takes the others along.
        if self._last_event is None or not may_batch_events():
            return 0.0
        # Airflow stores some 50 events a second.
        return max(0.0, self._last_event + self.scheduler_delay + count / 50 - time.monotonic())

    def _on_look(self, look: Look) -> float:
        """Log what a look brought beside events, and return the seconds before which none may follow."""
        for run_id in look.overdue:
            self.log.warning(
                "Dify workflow run %s is no longer watched: it is not over %g seconds after its creation "
                "(run_timeout). Such a record is usually orphaned: the server that ran it was killed.",
                run_id,
                self.policy.run_timeout,
            )
        if self.filter.triggered_from and not self._is_filter_checked:
            self._check_filter(look)
        if look.error is not None:
            return self._on_failure(look.error)
        if self._failures:
            self.log.info("Dify's log of connection %r can be read again.", self.dify_conn_id)
        self._failures = 0
        return 0.0

    def _check_filter(self, look: Look) -> None:
        self._is_filter_checked = bool(look.finished)
        if any(run.triggered_from is None for run in look.finished):
            self.log.warning(
                "The log of connection %r does not say what started the runs, as Dify before 1.10. So the filter "
                "triggered_from lets none of them through.",
                self.dify_conn_id,
            )

    def _on_failure(self, error: Exception) -> float:
        """Log a failed look, once a minute at most, and return the seconds before which none may follow."""
        self._failures += 1
        now = time.monotonic()
        if now >= self._next_complaint:
            self._next_complaint = now + COMPLAINT_INTERVAL
            is_ours = isinstance(error, DifyError)
            self.log.warning(
                "The runs of connection %r could not be looked at, %d times in a row; trying again: %s",
                self.dify_conn_id,
                self._failures,
                str(error) if is_ours else f"{type(error).__name__}: {error!s:.300}",
                exc_info=not is_ours,
            )
        return delay_after(error, self._failures, self.retry_delay) or min(
            self.retry_delay * 2.0 ** min(self._failures, 16), MAX_RETRY_DELAY
        )

    def _until_next_look(self, now: float) -> float:
        """
        Return the seconds until the next look. The moments are the same for all who watch an app with the same
        interval, so that they share what they read, and others than those of another app.
        """
        interval = self.policy.poll_interval
        offset = zlib.crc32(self.dify_conn_id.encode()) / 2**32 * interval
        return interval - (now - offset) % interval

    @property
    def _state_key(self) -> str:
        """What the window is stored under: two watchers of an asset have one each."""
        what = json.dumps([self.dify_conn_id, self.filter.serialize()])
        return f"dify_workflow_runs_{digest_of(what)}"

    async def _load(self) -> RunWindow:
        store = asset_state_of(self)
        if store is None:
            return _windows.get(self._state_key, RunWindow())
        return RunWindow.deserialize(await store.aget(self._state_key))

    async def _save(self, window: RunWindow, stored: RunWindow | None) -> RunWindow | None:
        """Store a window, and return what is stored then."""
        store = asset_state_of(self)
        if store is None:
            _windows[self._state_key] = window
            return window
        try:
            await store.aset(self._state_key, window.serialize())
        except Exception as error:
            # The next look tries again; until then a restart would repeat runs.
            self._on_failure(error)
            return stored
        return window


def _load_reading() -> Any:
    from airflow_provider_dify.hooks.dify_async import SharedReading

    return SharedReading
