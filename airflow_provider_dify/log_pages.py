"""How an app's log is read page by page without missing a row. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.models import LogRow, runs_of, time_of

# The largest page that Dify returns.
_MAX_SIZE = 100


@dataclass(frozen=True)
class LogPage:
    """
    A page of the log, the newest rows first.

    Dify sorts the log by whole seconds. Rows of one second come in any order, and in another one on each page. So a
    page by its number may leave out a row of the second with which the page before ended, and repeat another one. So
    each page begins with the last second of the page before instead: rows may come twice, and none is missed. What can
    still be missed is a row of a second that has more than 100.

    :param size: rows that are asked for.
    :param number: the page's number, from 1.
    :param created_before: the newest second of the page; ``None`` for the log's beginning.
    :param next_size: rows of the next page.
    :param is_filtered: whether the server is known to filter by time, or may.
    """

    size: int
    number: int = 1
    created_before: datetime | None = None
    next_size: int | None = None
    is_filtered: bool = True

    def request(
        self, *, user: str | None = None, created_after: datetime | None = None, patience: float = 0.0
    ) -> Call[list[LogRow]]:
        """
        Return the request for the page.

        :param user: whose runs; everybody's by default.
        :param created_after: the oldest second of the rows.
        :param patience: seconds that the server gets for the page at least.
        """
        return calls.logged_runs(
            user=user,
            created_after=created_after,
            created_before=self.created_before,
            page=self.number,
            limit=self.size,
            patience=patience,
        )

    def after(self, rows: Sequence[LogRow], *, not_before: datetime | None = None) -> LogPage | None:
        """
        Return the next page.

        :param rows: the rows of this one.
        :param not_before: when the oldest run that is wanted was created, for a server that knows no such filter.
        :return: the page after it; ``None`` at the log's end, or where older runs begin.
        """
        if len(rows) < self.size:
            return None
        began = next((run.created_at for run in reversed(runs_of(rows))), None)
        if not_before is not None and began is not None and began < not_before:
            return None
        newest, oldest = time_of(rows[0]), time_of(rows[-1])
        before = self.created_before
        if not self.is_filtered or newest is None or oldest is None or (before is not None and newest > before):
            # A server that knows no such filter, or tells no time.
            return replace(self, number=self.number + 1, created_before=None, is_filtered=False)
        size = self.next_size or self.size
        if oldest < newest:
            return LogPage(size, created_before=oldest)
        if self.size < _MAX_SIZE:
            # All of one second, so that the next page would begin with the same rows.
            return LogPage(_MAX_SIZE, created_before=oldest, next_size=size)
        return replace(self, number=self.number + 1)
