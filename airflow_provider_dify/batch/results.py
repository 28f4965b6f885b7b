# SPDX-License-Identifier: Apache-2.0
"""What a batch's runs returned: one JSON object a row, in parts. Pure; the time is given."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from airflow_provider_dify.api.models import WorkflowRun

# A part is written as soon as it has so many rows or bytes, or its first result is so many seconds old.
PART_ROWS = 1_000
PART_BYTES = 8_000_000
PART_SECONDS = 30.0
# The same for a result that Dify's log does not know: of a row that was rejected, say.
UNLOGGED_SECONDS = 1.0


@dataclass(frozen=True)
class RowResult:
    """What became of a row, which counts from 0; of several runs it is the last one's."""

    index: int
    status: str  # of the run; "failed" for a row that has no run
    outputs: dict[str, Any] | None = None
    error: str | None = None  # why it failed, in Dify's words where a run failed
    workflow_run_id: str | None = None  # None for a row that has no run
    total_tokens: int | None = None
    elapsed_time: float | None = None
    attempts: int = 1  # runs that were started for the row
    uploaded: dict[str, int] | None = None  # files and bytes, of a row that has any

    @classmethod
    def of_run(cls, index: int, run: WorkflowRun) -> RowResult:
        """Return the result of a row by its last run, which is over."""
        return cls(
            index,
            str(run.status),
            outputs=run.outputs,
            error=run.error,
            workflow_run_id=run.id,
            total_tokens=run.total_tokens,
            elapsed_time=run.elapsed_time,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values, in the order of the fields."""
        # Not asdict, which copies the outputs.
        return {name: getattr(self, name) for name in _FIELDS if name != "uploaded" or self.uploaded}

    def to_line(self) -> str:
        """Return the result as a line of JSON Lines, with its end."""
        # Escaped, so that a lone surrogate in an output can be written, too.
        return json.dumps(self.to_dict(), separators=(",", ":")) + "\n"

    @classmethod
    def from_line(cls, line: str) -> RowResult | None:
        """Return the result of a line; ``None`` for a line that is cut, or is none of a result."""
        try:
            data = json.loads(line) if line.endswith("\n") else None
        except (ValueError, RecursionError):
            return None
        if not isinstance(data, dict) or "index" not in data:
            return None
        known: dict[str, Any] = {name: data[name] for name in _FIELDS if name in data}
        return cls(**known)


_FIELDS = tuple(item.name for item in fields(RowResult))


@dataclass(frozen=True)
class Checkpoint:
    """What a part says about the rest of the batch, in its last line."""

    max_active_runs: int  # how many rows may have been under way at once
    # Runs that Dify was asked to stop when the task was killed. Some servers leave their records as `running` for ever.
    stopped_runs: tuple[str, ...] = ()
    rows: int = 0  # whose results are in this part and those before; if fewer are there, a part is gone
    since: float = 0.0  # epoch seconds of the batch's first start; 0 in parts of older versions
    last_lost: int = -1  # the last row whose start got lost, so that Dify's log may not have it
    listing: str = ""  # what the batch's files were, where these are its rows

    def to_line(self) -> str:
        """Return the checkpoint as a line of JSON Lines, with its end."""
        return json.dumps({"checkpoint": asdict(self)}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Checkpoint | None:
        """Return the checkpoint of a line, maybe of another version; ``None`` for any other line."""
        try:
            data = json.loads(line)["checkpoint"] if line.endswith("\n") else None
            if data is None:
                return None
            stopped = tuple(map(str, data["stopped_runs"]))
            since, last_lost = float(data.get("since", 0.0)), int(data.get("last_lost", -1))
            listing = str(data.get("listing", ""))
            return cls(int(data["max_active_runs"]), stopped, int(data["rows"]), since, last_lost, listing)
        except (ValueError, RecursionError, KeyError, TypeError):
            return None


class RowSet:
    """A set of row numbers, in one byte for each row up to the last."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._count = 0

    def add(self, index: int) -> bool:
        """Add a row; return whether it is new."""
        if index in self:
            return False
        if index >= len(self._bytes):
            self._bytes.extend(bytes(index + 1 - len(self._bytes)))
        self._bytes[index] = 1
        self._count += 1
        return True

    @property
    def last(self) -> int:
        """The highest row; -1 for none."""
        return len(self._bytes) - 1

    def __contains__(self, index: int) -> bool:
        return 0 <= index < len(self._bytes) and bool(self._bytes[index])

    def __len__(self) -> int:
        return self._count


@dataclass(frozen=True)
class Part:
    """Results that are to be written together, and what the part says about the rest."""

    lines: list[tuple[int, str]]  # by row, sorted
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """A new name for the part; a name isn't used twice, because a task that counts as dead may still be writing."""
        first = self.lines[0][0] if self.lines else 0
        return f"{first:09d}-{uuid.uuid4().hex[:12]}.jsonl"


class PartBuffer:
    """
    The results since the last part. A part must be written before the next one is taken, because its checkpoint speaks
    for the parts before it. Times are epoch seconds.
    """

    def __init__(self, first: Checkpoint) -> None:
        self._checkpoint = first
        self._lines: dict[int, str] = {}
        self._size = 0
        self._due: float | None = None

    @property
    def rows(self) -> int:
        """Rows whose results are in a part."""
        return self._checkpoint.rows

    def add(self, result: RowResult, now: float) -> None:
        """Take a row's result. One without a run is due sooner: after a crash Dify's log would not have it."""
        line = result.to_line()
        self._size += len(line) - len(self._lines.get(result.index, ""))
        self._lines[result.index] = line
        self._set_due(now + (UNLOGGED_SECONDS if result.workflow_run_id is None else PART_SECONDS))

    def add_lost(self, row: int, now: float) -> None:
        """Take note of a row whose start got lost."""
        self._checkpoint = replace(self._checkpoint, last_lost=max(self._checkpoint.last_lost, row))
        self._set_due(now + UNLOGGED_SECONDS)

    def _set_due(self, due: float) -> None:
        self._due = due if self._due is None else min(self._due, due)

    def is_due(self, now: float) -> bool:
        """Return whether a part is to be written now."""
        if self._due is None:
            return False
        return now >= self._due or len(self._lines) >= PART_ROWS or self._size >= PART_BYTES

    def take(self, stopped_runs: tuple[str, ...] = ()) -> Part:
        """Return all results since the last part, to be written, with the runs that were stopped with the task."""
        lines = sorted(self._lines.items())
        self._lines, self._size, self._due = {}, 0, None
        self._checkpoint = replace(self._checkpoint, rows=self.rows + len(lines))
        return Part(lines, replace(self._checkpoint, stopped_runs=stopped_runs))
