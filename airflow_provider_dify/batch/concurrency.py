"""How many runs a batch has at once: as many as it may, fewer while Dify turns starts away. Pure; the time is given."""

from __future__ import annotations

# Seconds without a refusal after which there may be one run more at once.
GROWTH_INTERVAL = 10.0
# Seconds without a start after the first refusal, doubled with each further one in a row.
FIRST_PAUSE = 1.0
MAX_PAUSE = 60.0


class RunLimit:
    """
    The number of runs at once: halved when Dify says that there are too many, grown again by one at a time.

    Whoever starts a run asks :meth:`may_start` first, and reports what came of it. A row keeps its place until it is
    over, through its retries and the pauses between them.

    :param max_active_runs: the most runs at once.
    :ivar limit: the number of runs at once as it is now.
    """

    def __init__(self, max_active_runs: int) -> None:
        self.limit = max_active_runs
        self._most = max_active_runs
        self._refusals = 0
        self._last_change = float("-inf")
        self._paused_until = float("-inf")

    def may_start(self, active: int, now: float) -> bool:
        """
        Return whether a start may be sent now.

        :param active: runs that are under way, the starts among them that have no response yet included.
        :param now: seconds of any clock that doesn't go back.
        """
        if now < self._paused_until:
            return False
        # Only when the present number is in use, so that one run more tells something.
        if active == self.limit < self._most and now - self._last_change >= GROWTH_INTERVAL:
            self.limit += 1
            self._last_change = now
        return active < self.limit

    def seconds_until_change(self, active: int, now: float) -> float | None:
        """
        Return when to ask :meth:`may_start` again, if no run ends before.

        :param active: as for :meth:`may_start`.
        :param now: as for :meth:`may_start`.
        :return: seconds, 0 for at once; ``None`` if nothing changes until a run ends.
        """
        if now < self._paused_until:
            return self._paused_until - now
        if active == self.limit < self._most:
            return max(0.0, self._last_change + GROWTH_INTERVAL - now)
        return None if active >= self.limit else 0.0

    def on_refused(self, sent_at: float, now: float, retry_after: float | None = None) -> bool:
        """
        Take note that Dify turned a start away because it has too many.

        Starts that were under way when the number was halved say nothing about the new one.

        :param sent_at: when the start was sent.
        :param now: the present.
        :param retry_after: seconds that the server asked to wait.
        :return: whether the number was halved, for a line in the log.
        """
        is_new = sent_at >= self._last_change
        if is_new:
            self._refusals += 1
            self._last_change = now
            self.limit = max(1, self.limit // 2)
        pause = min(FIRST_PAUSE * 2.0 ** (min(self._refusals, 16) - 1), MAX_PAUSE)
        self._paused_until = max(self._paused_until, now + (pause if is_new else 0.0), now + (retry_after or 0.0))
        return is_new

    def on_started(self) -> None:
        """Take note that Dify took a start."""
        self._refusals = 0
