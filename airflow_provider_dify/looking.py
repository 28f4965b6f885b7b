"""How a look into Dify's log is repeated: through failures, and until a run is there. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from airflow_provider_dify.api.calls import Steps
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.task_clock import TaskClock
from airflow_provider_dify.waiting import delay_after

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

T = TypeVar("T")

# Seconds after the first failure; doubled with each further one.
RETRY_DELAY = 1.0


@dataclass(frozen=True)
class RepeatedLook:
    """
    A look into Dify's log that is repeated.

    :param clock: the task's deadline.
    :param log: the task's log.
    :param poll_interval: seconds between polls of a run.
    """

    clock: TaskClock
    log: Logger
    poll_interval: float

    def through_failures(self, look: Callable[[], Steps[T]], max_failures: int) -> Steps[T]:
        """
        Look once, and again where that fails as a poll may: that Dify is away is no reason to give a run up.

        :param look: the look.
        :param max_failures: how often in a row it may fail.
        :return: what the look returns.
        :raises DifyConnectionError: if it fails more often, or when the deadline is over.
        :raises DifyError: as the look does.
        """
        failures = 0
        while True:
            try:
                return (yield from look())
            except DifyConnectionError as error:
                failures += 1
                if failures > max_failures or self.clock.is_over:
                    raise
                self.log.warning(
                    "The runs of earlier tries could not be looked up, %d in a row of at most %d: %s",
                    failures,
                    max_failures,
                    error,
                )
                delay = max(self.poll_interval, delay_after(error, failures, RETRY_DELAY))
            yield from self.clock.pause(delay)

    def until_found(
        self, look: Callable[[], Steps[T | None]], seconds_left: Callable[[bool], float]
    ) -> Steps[T | None]:
        """
        Look until something is there: often at first, and then as often as a run is polled.

        :param look: the look, which returns ``None`` for nothing.
        :param seconds_left: returns how long to go on; it is given whether the last look failed.
        :return: what the look returns; ``None`` if the time is over.
        :raises DifyError: as the look does, but no :class:`DifyConnectionError`.
        """
        interval = min(1.0, self.poll_interval)
        while True:
            has_failed = False
            found: T | None = None
            try:
                found = yield from look()
            except DifyConnectionError as failure:
                # Let out, it would have Airflow retry, and the retry start another run.
                self.log.warning("Dify's log could not be read; looking again: %s", failure)
                has_failed = True
            if found is not None:
                return found
            left = seconds_left(has_failed)
            if left <= 0 or self.clock.is_over:
                return None
            yield from self.clock.pause(min(interval, left))
            interval = min(interval * 2, max(self.poll_interval, 1.0))
