# SPDX-License-Identifier: Apache-2.0
"""
The files of a batch's results, one JSON object a row: in parts while it runs, in one file in row order at its end.

Runs end out of order, so results don't wait for their turn in memory: they are written in parts as they come, beside
the file that they are for, and merged at the end. No storage can append to an object, and a local file that is being
written may be cut by a crash. So a part is a file of its own, written at once and never changed. Its last line says
that it is whole, and counts the rows of all parts so far, so that one that was removed or cut is missed. A crash loses
the results since the last part. Their runs are in Dify's log, so they are read again and not paid again.

Each part is sorted and has its first row in its name. So the merge reads the parts as streams, opens each when its
first row is due, and has about ``max_active_runs`` open at once, whatever the number of rows.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

from airflow_provider_dify.api.models import one_line, redact
from airflow_provider_dify.batch.naming import BatchName
from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.results import Checkpoint, Part, PartBuffer, RowResult, RowSet
from airflow_provider_dify.batch.resuming import EarlierTries
from airflow_provider_dify.batch.rows import check_listing, is_file, listing_of
from airflow_provider_dify.exceptions import BATCH_SECTION, DifyConfigurationError, DifyError, DifyOutputsError
from airflow_provider_dify.runs.storage import is_same_file, open_stream, storage_errors, storage_path
from airflow_provider_dify.tasks.xcoms import xcom_problem

# What a return value may have: an XCom is a row of Airflow's database.
MAX_RETURNED_ROWS = 1_000
MAX_RETURNED_BYTES = 1_000_000
# A merge has many parts open, each with a buffer of this size.
_MERGE_BUFFER = 262_144
_PART_NAME = re.compile(r"(\d{9,})-[0-9a-f]{12}\.jsonl")
_LINE = re.compile(r'\{"index":(\d+),.*\}\n', re.S)
_MERGED = "merged"


@dataclass
class WrittenResults:
    """What the parts of earlier tries say, and which rows' results they have."""

    rows: RowSet = field(default_factory=RowSet)
    # All of them together; None if this batch has written nothing yet, or nothing is left to do.
    checkpoint: Checkpoint | None = None
    is_complete: bool = False  # whether the output file was complete already, so that nothing is to be started any more

    @property
    def is_damaged(self) -> bool:
        """Whether a part is gone or cut that a later one counts."""
        return self.checkpoint is not None and len(self.rows) < self.checkpoint.rows


class ResultFiles:
    """
    The files of a batch's results: the parts lie in ``OUTPUT_PATH.parts/NAME/``, so that no other Dag run's are taken
    for its own. Each method blocks: an event loop calls it in a thread, one call after another. Each raises a DifyError
    if the storage fails.
    """

    def __init__(self, output_path: str, name: BatchName) -> None:
        self.output_path = output_path
        self.inputs: Any = None  # once they were checked
        self._name = name
        self._file = storage_path(output_path)
        self._folder = self._file.parent / f"{self._file.name}.parts" / name.folder

    def check(self, inputs: Any) -> None:
        """Check, before anything is started, that the path names a file, and not that of the inputs."""
        self.inputs = inputs
        shown = repr(_shown(self.output_path))
        if not self.output_path.strip() or not self._file.name:
            raise DifyConfigurationError(f"output_path must name a file, but it is {shown}.")
        with storage_errors(self._file, "read"):
            is_folder = self._file.is_dir()
        if is_folder:
            raise DifyConfigurationError(f"output_path must name a file, but {shown} is a folder.")
        if is_file(inputs) and is_same_file(storage_path(inputs), self._file):
            raise DifyConfigurationError(f"output_path is {shown}, so the results would replace the inputs.")

    def read_written(self, on_result: Callable[[RowResult], object] = lambda result: None) -> WrittenResults:
        """Read what earlier tries have written, as a stream; ``on_result`` gets each result, to count it."""
        written = WrittenResults(is_complete=self.is_merged)
        parts = [_lines_of(self._file)] if written.is_complete else [lines for _, lines in self._parts()]
        for line in chain.from_iterable(parts):
            result = RowResult.from_line(line)
            if result is None:
                written.checkpoint = _join(written.checkpoint, Checkpoint.from_line(line))
            elif written.rows.add(result.index):
                on_result(result)
        return written

    def begin(self, checkpoint: Checkpoint) -> None:
        """Write the first checkpoint, before anything is started; raise if another mapped task writes to the file."""
        self.write(Part([], checkpoint))
        # Looked for afterwards: of two that begin at once, one sees the other.
        beside = next((name for name in self._batches() if name.is_beside(self._name)), None)
        if beside is not None:
            with storage_errors(self._folder, "removed"):
                self._remove(self._folder)
            raise DifyConfigurationError(
                f"output_path is {_shown(self.output_path)!r}, which is that of map index "
                f"{beside.map_index} of this task, too. Each mapped task needs a file of its own: put "
                "{{ ti.map_index }} into it. Nothing was started."
            )

    def write(self, part: Part) -> None:
        """Write a part."""
        self._write(self._folder / part.name, [*(line for _, line in part.lines), part.checkpoint.to_line()])

    def merge(self, expected: int) -> None:
        """
        Write all results into the output file, in row order; raise a DifyError if the parts have fewer than expected.
        Interrupted at any moment, it can be called again: the parts are still there.
        """
        if self.is_merged:
            return
        merged = 0

        def lines() -> Iterator[str]:
            nonlocal merged
            for _, line in merge_parts(self._parts()):
                merged += 1
                yield line

        self._write(self._file, lines())
        if merged < expected:
            raise DifyError(
                f"{expected - merged:,} of {expected:,} results are missing: parts in {_shown(self._folder)} were "
                f"removed or cut while the batch ran. {_shown(self.output_path)} has the others. A retry reads the "
                "missing ones from Dify's log."
            ).explained_in(BATCH_SECTION)
        # From now on the parts may go: which of them are left says nothing any more.
        self._write(self._folder / _MERGED, [""])

    def remove_parts(self) -> None:
        """
        Remove the parts, after the merge, as the last thing that the batch does. What the same task has left from
        before it was cleared goes with them.
        """
        outer = self._folder.parent
        before = [name for name in self._batches() if name.is_before(self._name)]
        with storage_errors(outer, "removed"):
            for name in (self._name, *before):
                self._remove(outer / name.folder)
            # It may have another batch's parts.
            with contextlib.suppress(OSError, NotImplementedError):
                outer.fs.rmdir(outer.path)

    @staticmethod
    def _remove(folder: Any) -> None:
        for path in _parts_in(folder):
            path.unlink(missing_ok=True)
        (folder / _MERGED).unlink(missing_ok=True)
        with contextlib.suppress(OSError, NotImplementedError):
            folder.fs.rmdir(folder.path)

    @property
    def is_merged(self) -> bool:
        """Whether an earlier try has written the output file, and was ended before it removed the parts."""
        with storage_errors(self._folder, "read"):
            return bool((self._folder / _MERGED).exists())

    def _batches(self) -> list[BatchName]:
        """Return the batches that have parts of this file."""
        outer = self._folder.parent
        with storage_errors(outer, "read"):
            names = [BatchName.parse(path.name) for path in outer.iterdir()] if outer.exists() else []
        return [name for name in names if name is not None]

    def _parts(self) -> list[tuple[int, Iterator[str]]]:
        """Return each part's first row and its lines, in the order of these rows."""
        with storage_errors(self._folder, "read"):
            found = [(int(path.name.partition("-")[0]), path.name, path) for path in _parts_in(self._folder)]
        # Generators: none is opened before its first line is asked for.
        return [(first, _lines_of(path)) for first, _, path in sorted(found, key=lambda part: part[:2])]

    @staticmethod
    def _write(path: Any, lines: Iterable[str]) -> None:
        with storage_errors(path, "written"):
            try:
                file = open_stream(path, "w", newline="\n")
            except FileNotFoundError:
                # Only where folders have to be made.
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open_stream(path, "w", newline="\n")
            with file:
                file.writelines(lines)


def _shown(path: object) -> str:
    return one_line(redact(str(path), ()), 300)


def _lines_of(path: Any) -> Iterator[str]:
    options = {"errors": "replace", "newline": "\n", "block_size": _MERGE_BUFFER}
    with storage_errors(path, "read"), open_stream(path, "r", **options) as file:
        while line := file.readline():
            yield line


def _parts_in(folder: Any) -> list[Any]:
    return [path for path in folder.iterdir() if _PART_NAME.fullmatch(path.name)] if folder.exists() else []


def merge_parts(parts: Iterable[tuple[int, Iterator[str]]]) -> Iterator[tuple[int, str]]:
    """
    Merge the lines of sorted parts into one sequence of row and line, in row order, each row once. The parts come
    sorted by their first row, and each is read from when that row is due.
    """
    waiting = iter(parts)
    upcoming = next(waiting, None)
    heap: list[tuple[int, int, str, Iterator[str]]] = []
    order = 0
    last = -1
    while heap or upcoming is not None:
        while upcoming is not None and (not heap or upcoming[0] <= heap[0][0]):
            order += 1
            _push(heap, order, upcoming[1])
            upcoming = next(waiting, None)
        if not heap:
            continue
        index, number, line, rest = heapq.heappop(heap)
        _push(heap, number, rest)
        if index > last:
            last = index
            yield index, line


def _push(heap: list[tuple[int, int, str, Iterator[str]]], number: int, lines: Iterator[str]) -> None:
    for line in lines:
        # Not parsed: outputs may be long, and a line that is whole is one that we wrote.
        found = _LINE.fullmatch(line)
        if found:
            heapq.heappush(heap, (int(found[1]), number, line, lines))
            return


def _join(first: Checkpoint | None, second: Checkpoint | None) -> Checkpoint | None:
    if first is None or second is None:
        return first or second
    return Checkpoint(
        max(first.max_active_runs, second.max_active_runs),
        first.stopped_runs + second.stopped_runs,
        max(first.rows, second.rows),
        min(first.since, second.since),
        max(first.last_lost, second.last_lost),
        first.listing or second.listing,
    )


class Output:
    """Where results go. Here nothing is kept from try to try."""

    # Whether a retry knows which runs were stopped, whatever their records say.
    remembers_stops = False
    is_complete = False
    earlier: EarlierTries

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return False

    async def begin(self) -> None:
        """Be ready for the first start."""

    def on_untraced(self, row: int, *, is_lost: bool) -> None:
        """Take note of a row that was begun, and that Dify's log may not have."""

    def add(self, result: RowResult) -> None:
        """Take a row's result; raise a DifyOutputsError if the results are too much for a return value."""
        raise NotImplementedError

    async def write_if_due(self) -> None:
        """
        Write a part, if one is due, while the runs go on. A retry counts on it that no more rows than may run at once
        have left no trace. If they have, wait for the part.
        """

    async def flush(self, stopped_runs: tuple[str, ...]) -> None:
        """Write what is not written yet, at the end of a try."""

    def finish(self) -> Any:
        """Return the task's return value, once the batch is over."""
        raise NotImplementedError

    def remove_parts(self) -> None:
        """Remove what only a further try needs."""


class ReturnedOutput(Output):
    """
    Results that are the task's return value, within bounds; too many rows fail before any start. An earlier try's are
    read from Dify again.
    """

    def __init__(self, total: int, earlier: EarlierTries) -> None:
        if total > MAX_RETURNED_ROWS:
            raise DifyConfigurationError(
                f"The batch has {total:,} rows, and at most {MAX_RETURNED_ROWS:,} can be a return value. Set "
                "output_path, and read the results from that file. Nothing was started."
            )
        self.earlier = earlier
        self._results: dict[int, RowResult] = {}
        self._size = 0

    def add(self, result: RowResult) -> None:
        # What runs return can't be known before they do; so the batch ends as soon as it is known.
        problem = xcom_problem(result.to_dict())
        if problem:
            raise DifyOutputsError(
                f"Row {result.index:,} {problem}, which Airflow cannot store as an XCom: Dify workflow run "
                f"{result.workflow_run_id} is over, but its result cannot be part of a return value. Set output_path, "
                "and read the results from that file."
            ).explained_in(BATCH_SECTION)
        self._size += len(result.to_line())
        self._results[result.index] = result
        if self._size > MAX_RETURNED_BYTES:
            raise DifyOutputsError(
                f"The results of {len(self._results):,} rows have more than {MAX_RETURNED_BYTES / 1e6:g} MB, which is "
                "too much for a return value. Set output_path, and read the results from that file."
            ).explained_in(BATCH_SECTION)

    def finish(self) -> list[dict[str, Any]]:
        return [self._results[index].to_dict() for index in sorted(self._results)]


class FileOutput(Output):
    """Results that are written into a file, in parts first. ``progress`` counts those of earlier tries."""

    remembers_stops = True

    def __init__(
        self, files: ResultFiles, max_active_runs: int, progress: BatchProgress, earlier: EarlierTries
    ) -> None:
        self._files = files
        written = self._files.read_written(progress.add)
        self._rows: RowSet = written.rows
        self.is_complete = written.is_complete
        # The first part is written before anything is started. Without it an earlier try may have started all the same:
        # it may have removed the parts at its end, or written them on another worker's disk.
        checkpoint = written.checkpoint
        self._has_begun = checkpoint is not None
        if checkpoint is not None:
            check_listing(files.inputs, checkpoint.listing)
        self.earlier = replace(earlier, last_row=written.rows.last)
        if checkpoint is not None:
            self.earlier = EarlierTries(
                checkpoint.since or earlier.since,
                can_be=True,
                number=max(1, earlier.number),
                # Parts of older versions don't say which rows got lost.
                has_parts=not written.is_damaged and checkpoint.since > 0,
                last_row=max(written.rows.last, checkpoint.last_lost),
                max_active_runs=checkpoint.max_active_runs,
                stopped_runs=frozenset(checkpoint.stopped_runs),
            )
        elif not earlier.can_be:
            self.earlier = replace(self.earlier, since=time.time())
        self._first = Checkpoint(max_active_runs, since=self.earlier.since, listing=listing_of(files.inputs))
        self._buffer = PartBuffer(replace(self._first, rows=len(written.rows)))
        # Rows that neither Dify's log nor a part has, and those of them that are being written.
        self._untraced = 0
        self._untraced_in_part = 0
        self._writing: asyncio.Task[None] | None = None
        self._is_broken = False

    def has(self, row: int) -> bool:
        return row in self._rows

    async def begin(self) -> None:
        if not self._has_begun:
            await asyncio.to_thread(self._files.begin, self._first)

    def add(self, result: RowResult) -> None:
        self._buffer.add(result, time.time())

    def on_untraced(self, row: int, *, is_lost: bool) -> None:
        self._untraced += 1
        if is_lost:
            self._buffer.add_lost(row, time.time())

    async def write_if_due(self) -> None:
        if self._writing is not None and (self._writing.done() or self._is_full):
            await self._end_writing()
        if self._writing is None and not self._is_broken and (self._is_full or self._buffer.is_due(time.time())):
            self._untraced, self._untraced_in_part = 0, self._untraced
            self._writing = asyncio.create_task(asyncio.to_thread(self._files.write, self._buffer.take()))
            if self._is_full:
                await self._end_writing()

    @property
    def _is_full(self) -> bool:
        return self._untraced + self._untraced_in_part >= self._first.max_active_runs

    async def flush(self, stopped_runs: tuple[str, ...]) -> None:
        if self._writing is not None:
            await self._end_writing()
        # A further part would say that the one that is missing is there.
        if not self._is_broken:
            await asyncio.to_thread(self._files.write, self._buffer.take(stopped_runs))

    async def _end_writing(self) -> None:
        writing, self._writing = self._writing, None
        assert writing is not None  # noqa: S101
        try:
            await writing
            self._untraced_in_part = 0
        except BaseException:
            self._is_broken = True
            raise

    def finish(self) -> Any:
        self._files.merge(self._buffer.rows)
        return self._files.output_path

    def remove_parts(self) -> None:
        self._files.remove_parts()
