"""What a batch's runs returned: one JSON object a row, in parts, or as a return value. Pure; the time is given."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyOutputsError
from airflow_provider_dify.tasks.xcoms import xcom_problem

# A part is written as soon as it has so many rows or bytes, or its first result is so many seconds old.
PART_ROWS = 1_000
PART_BYTES = 8_000_000
PART_SECONDS = 30.0
# The same for a result that Dify's log does not know: of a row that was rejected, say.
UNLOGGED_SECONDS = 1.0
# What a return value may have: an XCom is a row of Airflow's database.
MAX_RETURNED_ROWS = 1_000
MAX_RETURNED_BYTES = 1_000_000


@dataclass(frozen=True)
class RowResult:
    """
    What became of a row.

    :param index: the row's number, from 0.
    :param status: the run's status; ``failed`` for a row that has no run.
    :param outputs: the run's outputs.
    :param error: why it failed, in Dify's words where a run failed.
    :param workflow_run_id: the last run's UUID; ``None`` for a row that has none.
    :param total_tokens: language model tokens of the last run.
    :param elapsed_time: seconds that the last run took.
    :param attempts: runs that were started for the row.
    """

    index: int
    status: str
    outputs: dict[str, Any] | None = None
    error: str | None = None
    workflow_run_id: str | None = None
    total_tokens: int | None = None
    elapsed_time: float | None = None
    attempts: int = 1

    @classmethod
    def of_run(cls, index: int, run: WorkflowRun, attempts: int) -> RowResult:
        """
        Return the result of a run that is over.

        :param index: the row.
        :param run: its last run.
        :param attempts: runs that were started for the row.
        """
        return cls(
            index,
            str(run.status),
            outputs=run.outputs,
            error=run.error,
            workflow_run_id=run.id,
            total_tokens=run.total_tokens,
            elapsed_time=run.elapsed_time,
            attempts=attempts,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-ready values, in the order of the fields."""
        # Not asdict, which copies the outputs.
        return {name: getattr(self, name) for name in _FIELDS}

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
    """
    What a part says about the rest of the batch, in its last line.

    :param open_since: epoch seconds; whatever was started before is in a part, so that nobody has to look for it.
    :param max_active_runs: how many rows may have been under way at once.
    :param stopped_runs: UUIDs of runs that Dify was asked to stop when the task was killed. Some servers leave their
        records as ``running`` for ever.
    :param rows: rows whose results are in this part and those before. If fewer are there, a part is gone.
    """

    open_since: float
    max_active_runs: int
    stopped_runs: tuple[str, ...] = ()
    rows: int = 0

    def to_line(self) -> str:
        """Return the checkpoint as a line of JSON Lines, with its end."""
        return json.dumps({"checkpoint": asdict(self)}) + "\n"

    @classmethod
    def from_line(cls, line: str) -> Checkpoint | None:
        """Return the checkpoint of a line; ``None`` for any other line."""
        try:
            data = json.loads(line)["checkpoint"] if line.endswith("\n") else None
            if data is None:
                return None
            stopped = tuple(map(str, data["stopped_runs"]))
            return cls(float(data["open_since"]), int(data["max_active_runs"]), stopped, int(data["rows"]))
        except (ValueError, RecursionError, KeyError, TypeError):
            return None


class RowSet:
    """A set of row numbers, in one byte for each row up to the last."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._count = 0

    def add(self, index: int) -> bool:
        """
        Add a row.

        :return: whether it is new.
        """
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
    """
    Results that are to be written together.

    :param lines: the results' lines by row, sorted.
    :param checkpoint: what the part says about the rest.
    """

    lines: list[tuple[int, str]]
    checkpoint: Checkpoint

    @property
    def name(self) -> str:
        """A new name for the part; a name isn't used twice, because a task that counts as dead may still be writing."""
        first = self.lines[0][0] if self.lines else 0
        return f"{first:09d}-{uuid.uuid4().hex[:12]}.jsonl"


@dataclass
class PartBuffer:
    """
    The results since the last part, and which rows are open. Pure; the time is given.

    A part must be written before the next one is taken, because its checkpoint speaks for the parts before it.

    :param max_active_runs: how many rows may be under way at once.
    :param open_since: epoch seconds of the batch's own first start, or of the last checkpoint after a crash.
    :param rows: rows whose results are in a part of an earlier try.
    :ivar last_uncertain: the last row that an earlier try may have started. Until it is reached, whatever such a try
        has started is open.
    """

    max_active_runs: int
    open_since: float
    rows: int = 0
    last_uncertain: int = -1
    _reached: int = -1
    _open: dict[int, float] = field(default_factory=dict)
    _lines: dict[int, str] = field(default_factory=dict)
    _size: int = 0
    _due: float | None = None

    def open(self, index: int, started_at: float) -> None:
        """
        Take note of a row that is about to be started, or of one that was started by an earlier try.

        :param index: the row.
        :param started_at: epoch seconds; for an earlier try's row, the checkpoint that the row was found after.
        """
        self._reached = max(self._reached, index)
        self._open.setdefault(index, started_at)

    def add(self, result: RowResult, now: float, *, is_logged: bool = True) -> None:
        """
        Take a row's result.

        :param result: the result.
        :param now: epoch seconds.
        :param is_logged: whether Dify's log has the run, so that it could be found there after a crash.
        """
        line = result.to_line()
        self._reached = max(self._reached, result.index)
        self._size += len(line) - len(self._lines.get(result.index, ""))
        self._lines[result.index] = line
        due = now + (PART_SECONDS if is_logged else UNLOGGED_SECONDS)
        self._due = due if self._due is None else min(self._due, due)

    def is_due(self, now: float) -> bool:
        """Return whether a part is to be written now."""
        if self._due is None:
            return False
        return now >= self._due or len(self._lines) >= PART_ROWS or self._size >= PART_BYTES

    def take(self, now: float, stopped_runs: Iterable[str] = ()) -> Part:
        """
        Return all results since the last part, to be written.

        :param now: epoch seconds.
        :param stopped_runs: as for :class:`Checkpoint`, when the task was killed.
        """
        lines = sorted(self._lines.items())
        for index, _ in lines:
            self._open.pop(index, None)
        self._lines, self._size, self._due = {}, 0, None
        self.rows += len(lines)
        if self._reached >= self.last_uncertain:
            self.open_since = max(self.open_since, min(self._open.values(), default=now))
        return Part(lines, Checkpoint(self.open_since, self.max_active_runs, tuple(stopped_runs), self.rows))


class ReturnedResults:
    """
    The results of a batch that returns them as its XCom, within bounds.

    :param total: rows of the batch.
    :raises DifyConfigurationError: if they are too many, before anything is started.
    """

    def __init__(self, total: int) -> None:
        if total > MAX_RETURNED_ROWS:
            raise DifyConfigurationError(
                f"The batch has {total:,} rows, and at most {MAX_RETURNED_ROWS:,} can be a return value. Set "
                "output_path, and read the results from that file. Nothing was started."
            )
        self._results: dict[int, RowResult] = {}
        self._size = 0

    def add(self, result: RowResult) -> None:
        """
        Take a row's result.

        :raises DifyOutputsError: if Airflow can't store the result, or if the results are more than a return value may
            have. What runs return can't be known before they do; so the batch ends as soon as it is known.
        """
        problem = xcom_problem(result.to_dict())
        if problem:
            raise DifyOutputsError(
                f"Row {result.index:,} {problem}, which Airflow cannot store as an XCom: Dify workflow run "
                f"{result.workflow_run_id} is over, but its result cannot be part of a return value. Set output_path, "
                "and read the results from that file."
            )
        self._size += len(result.to_line())
        self._results[result.index] = result
        if self._size > MAX_RETURNED_BYTES:
            raise DifyOutputsError(
                f"The results of {len(self._results):,} rows have more than {MAX_RETURNED_BYTES / 1e6:g} MB, which is "
                "too much for a return value. Set output_path, and read the results from that file."
            )

    def in_order(self) -> list[dict[str, Any]]:
        """Return the results as JSON-ready values, in row order."""
        return [self._results[index].to_dict() for index in sorted(self._results)]
