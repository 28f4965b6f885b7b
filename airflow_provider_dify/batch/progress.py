# SPDX-License-Identifier: Apache-2.0
"""How far a batch is: its counts, a line for the log, its summary, and what it fails with. Pure; the time is given."""

from __future__ import annotations

import math
import re
from collections import deque
from dataclasses import dataclass
from typing import Any

from airflow_provider_dify.api.models import ENDED_STATUSES, WorkflowRunStatus, one_line
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.exceptions import DifyBatchFailed, DifyTokenLimitReached
from airflow_provider_dify.runs.waiting import counts_as_failed

# Errors that are counted one by one; a batch of a million rows may have as many texts.
_MAX_ERRORS = 200
_SHOWN_ERRORS = 3
# What differs between two texts of one error: ids and numbers.
_VARYING = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d+", re.I)
# Lines whose times the present speed is measured over.
_SPEED_LINES = 10

# The names of the counts, by status.
_COUNTED: dict[str, str] = {
    status: status.value.replace("-", "_") for status in WorkflowRunStatus if status in ENDED_STATUSES
}


def allowed_failures(max_failed_runs: float, total: int) -> int:
    """Return how many of so many runs may fail: a whole number, or a share of them, as a float such as 0.05."""
    # A share of 0.07 of 100 rows is 7 rows, not the 7.000000000000001 of the product.
    return math.floor(round(max_failed_runs * total, 6)) if isinstance(max_failed_runs, float) else max_failed_runs


@dataclass
class _Failures:
    """One kind of error: how often it came, and where it came first."""

    count: int
    text: str
    row: int
    workflow_run_id: str | None


class BatchProgress:
    """The counts of a batch, of which ``began_at`` is the first start in epoch seconds, by an earlier try maybe."""

    def __init__(
        self,
        total: int,
        max_failed_runs: float,
        *,
        began_at: float,
        fail_on_partial_success: bool = False,
        output_path: str | None = None,
        max_total_tokens: int | None = None,
    ) -> None:
        self.total = total
        self.over = 0
        # Those that count against max_failed_runs.
        self.failed_rows = 0
        self.total_tokens = 0
        self._max_failed_runs = max_failed_runs
        self._began_at = began_at
        self._fail_on_partial_success = fail_on_partial_success
        self._output_path = output_path
        self._max_total_tokens = max_total_tokens
        self._counts = dict.fromkeys(_COUNTED.values(), 0)
        self._errors: dict[str, _Failures] = {}
        # Time and rows over at each line; rows of earlier tries took no time of this one.
        self._lines: deque[tuple[float, int]] = deque(maxlen=_SPEED_LINES)

    def add(self, result: RowResult) -> bool:
        """Count a row that is over; return whether it counts as failed."""
        self.over += 1
        self.total_tokens += result.total_tokens or 0
        self._counts[_COUNTED.get(result.status, "failed")] += 1
        is_failure = counts_as_failed(result.status, self._fail_on_partial_success)
        if is_failure:
            self.failed_rows += 1
            self._count_error(result)
        return is_failure

    @property
    def has_failed(self) -> bool:
        """Whether more runs failed than may, so that nothing is started any more."""
        return self.failed_rows > allowed_failures(self._max_failed_runs, self.total)

    @property
    def has_used_tokens_up(self) -> bool:
        """Whether the runs have used more tokens than they may, so that nothing is started any more."""
        return self._max_total_tokens is not None and self.total_tokens > self._max_total_tokens

    def begin(self, now: float) -> None:
        """Take note that this try begins to start runs, after it has counted those of earlier tries."""
        self._lines.clear()
        self._lines.append((now, self.over))

    def line(self, active: int, now: float) -> str:
        """Such as ``412 of 1,000 runs are over (3 failed), 8 active, 1.2 M tokens, 3.4 runs/s, about 3 min left``."""
        failed = f" ({self.failed_rows:,} failed)" if self.failed_rows else ""
        parts = [f"{self.over:,} of {self.total:,} runs are over{failed}", f"{active:,} active"]
        if self.total_tokens:
            parts.append(f"{short_number(self.total_tokens)} tokens")
        speed = self._speed(now)
        self._lines.append((now, self.over))
        if speed:
            left = (self.total - self.over) / speed
            # Slower than one in ten seconds would be 0.0 a second.
            parts.append(f"{speed:.1f} runs/s" if speed >= 0.1 else f"{speed * 60:.1f} runs/min")
            parts.append(f"about {short_time(left)} left")
        return ", ".join(parts)

    def summary(self, now: float) -> dict[str, Any]:
        """Return the batch's XCom ``batch``; its ``elapsed_time`` is in seconds since the batch's first start."""
        return {
            "total": self.total,
            **self._counts,
            "total_tokens": self.total_tokens,
            "elapsed_time": round(max(0.0, now - self._began_at), 3),
            "output_path": self._output_path,
        }

    def raise_if_failed(self, now: float) -> None:
        """Raise a DifyBatchFailed, with the most frequent errors, if more runs failed than may."""
        if not self.has_failed:
            return
        left = self.total - self.over
        not_run = f" {left:,} rows were not run." if left else ""
        results = f" The results are in {one_line(self._output_path, 300)}." if self._output_path else ""
        raise DifyBatchFailed(
            f"{self.failed_rows:,} of {self.total:,} runs failed (max_failed_runs is {self._max_failed_runs}). "
            f"{self.describe_errors()}{not_run}{results}",
            summary=self.summary(now),
        )

    def raise_if_tokens_used_up(self) -> None:
        """Raise a DifyTokenLimitReached if rows are left because the runs have used more tokens than they may."""
        if self.has_used_tokens_up and self.over < self.total:
            raise DifyTokenLimitReached(
                f"The batch's runs have used {self.total_tokens:,} tokens (max_total_tokens is "
                f"{self._max_total_tokens:,}), so {self.total - self.over:,} of {self.total:,} rows were not run. "
                "Raise max_total_tokens: the task's next try continues with them."
            )

    def describe_errors(self) -> str:
        """Return the most frequent errors in one line, each with its first row and that row's run."""
        most = sorted(self._errors.values(), key=lambda kind: (-kind.count, kind.row))[:_SHOWN_ERRORS]
        shown = [
            f"{kind.count:,} times {kind.text!r} (first in row {kind.row:,}"
            f"{f', run {kind.workflow_run_id}' if kind.workflow_run_id else ''})"
            for kind in most
        ]
        return f"Most frequent errors: {'; '.join(shown)}." if shown else ""

    def _count_error(self, result: RowResult) -> None:
        text = one_line(result.error or f"no error text, status {result.status}", 200)
        kind = _VARYING.sub("#", text)
        known = self._errors.get(kind)
        if known is not None:
            known.count += 1
        elif len(self._errors) < _MAX_ERRORS:
            self._errors[kind] = _Failures(1, text, result.index, result.workflow_run_id)

    def _speed(self, now: float) -> float:
        """Return the rows that ended in a second, over the last lines; 0 where that isn't known yet."""
        if not self._lines:
            return 0.0
        at, over = self._lines[0]
        return (self.over - over) / (now - at) if now > at else 0.0


def short_number(number: float) -> str:
    """Return a number for a reader: ``950``, ``12.3 k``, ``1.2 M``."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= size:
            return f"{number / (1e3 if unit == 'k' else size):.1f} {unit}"
    return f"{number:,.0f}"


def short_time(seconds: float) -> str:
    """Return a time for a reader: ``40 s``, ``3 min``, ``2.5 h``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
