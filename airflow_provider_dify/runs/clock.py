"""The time that a task on a worker has: its deadline, and whether Airflow has killed it meanwhile."""

from __future__ import annotations

import time

from airflow_provider_dify.api.calls import Pause, Steps
from airflow_provider_dify.exceptions import DifyTaskKilled

# How soon a pause notices that the task was killed: a signal's handler doesn't end a sleep.
_SLICE = 0.25
# Seconds.
WEEK = 7 * 24 * 3600.0


class TaskClock:
    """
    The deadline of a task, and its end by a signal.

    :param deadline: epoch seconds at which the task gives up.
    :param longest_slice: seconds after which a pause looks at the clock again; on an event loop, which ends a pause by
        itself, there is no need to.
    :ivar was_killed: set by ``on_kill``, in a signal's handler or after ``execution_timeout``.
    """

    def __init__(self, deadline: float, longest_slice: float = _SLICE) -> None:
        self.deadline = deadline
        self._longest_slice = longest_slice
        self.was_killed = False

    @property
    def left(self) -> float:
        """Seconds until the deadline; 0 after it."""
        return max(0.0, self.deadline - time.time())

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return time.time() >= self.deadline

    def slice_of(self, seconds: float) -> float:
        """Return a part of a pause, after which the clock is looked at again."""
        return min(seconds, self.left, self._longest_slice)

    def check(self) -> None:
        """
        Check that the task goes on.

        :raises DifyTaskKilled: if Airflow killed it.
        """
        if self.was_killed:
            raise DifyTaskKilled(
                "Airflow killed the task while it waited for Dify. A retry starts or finds its run again."
            )

    def pause(self, seconds: float) -> Steps[None]:
        """
        Pause, but not beyond the deadline.

        :param seconds: how long.
        :raises DifyTaskKilled: if Airflow kills the task meanwhile.
        """
        until = time.monotonic() + seconds
        self.check()
        while (left := until - time.monotonic()) > 0 and not self.is_over:
            yield Pause(self.slice_of(left))
            self.check()
