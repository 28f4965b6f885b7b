"""
The files of a batch's results, one JSON object a row: in parts while it runs, in one file in row order at its end.

Runs end out of order, an early one maybe hours after its neighbours. So results don't wait for their turn in memory:
they are written in parts as they come, beside the file that they are for, and merged at the end. That suits every
storage. An object store can't append to an object, and shows a new one only when it is complete; a local file that is
being written may be cut by a crash. So a part is a file of its own, written at once and never changed, and ends with a
line that says so: without it the part counts as cut, and its whole lines still count. That line also counts the rows
of all parts so far, so that a part that was removed or cut is missed. A crash loses the results since
the last part. Their runs are in Dify's log, so they are read again and not paid again.

Each part is sorted and has its first row in its name, and runs start in row order. So the merge reads the parts as
streams, opens each when its first row is due, and has as many open at once as there were runs that overlapped, about
``max_active_runs``. It needs the memory of those buffers, whatever the number of rows.
"""

from __future__ import annotations

import contextlib
import heapq
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from airflow_provider_dify.api.text import one_line, redact
from airflow_provider_dify.batch.naming import BatchName
from airflow_provider_dify.batch.results import Checkpoint, Part, RowResult, RowSet
from airflow_provider_dify.batch.rows import is_file
from airflow_provider_dify.batch.storage import is_same_file, open_stream, storage_errors, storage_path
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyError

# A merge has many parts open, each with a buffer of this size.
_MERGE_BUFFER = 262_144
_PART_NAME = re.compile(r"(\d{9,})-[0-9a-f]{12}\.jsonl")
_LINE = re.compile(r'\{"index":(\d+),.*\}\n', re.S)
_MERGED = "merged"


@dataclass
class WrittenResults:
    """
    What the parts of an earlier try say.

    :param rows: the rows whose results are there.
    :param checkpoint: what the checkpoints say together; ``None`` if there is none, so that this batch has written
        nothing yet, or nothing is left to do.
    :param is_complete: whether the output file was complete already, so that nothing is to be started any more.
    """

    rows: RowSet = field(default_factory=RowSet)
    checkpoint: Checkpoint | None = None
    is_complete: bool = False

    @property
    def is_damaged(self) -> bool:
        """Whether a part is gone or cut that a later one counts."""
        return self.checkpoint is not None and len(self.rows) < self.checkpoint.rows


class ResultFiles:
    """
    The files of a batch's results. Each method blocks: an event loop calls it in a thread, one call after another.

    The parts lie in ``OUTPUT_PATH.parts/NAME/``. :meth:`remove_parts` removes them when ``OUTPUT_PATH`` is
    complete.

    :param output_path: where the results are to be; any path or URL that Airflow's object storage takes.
    :param name: the batch's name, so that no other Dag run's parts are taken for its own.
    """

    def __init__(self, output_path: str, name: BatchName) -> None:
        self.output_path = output_path
        self._name = name
        self._file = storage_path(output_path)
        self._folder = self._file.parent / f"{self._file.name}.parts" / name.folder

    def check(self, inputs: Any) -> None:
        """
        Check that the results can be written where they are to be, before anything is started.

        :param inputs: the batch's inputs.
        :raises DifyConfigurationError: if the path names no file, or a folder, or the file of the inputs.
        """
        shown = repr(one_line(redact(self.output_path, ()), 300))
        if not self.output_path.strip() or not self._file.name:
            raise DifyConfigurationError(f"output_path must name a file, but it is {shown}.")
        with storage_errors(self._file, "read"):
            is_folder = self._file.is_dir()
        if is_folder:
            raise DifyConfigurationError(f"output_path must name a file, but {shown} is a folder.")
        if is_file(inputs) and is_same_file(storage_path(inputs), self._file):
            raise DifyConfigurationError(f"output_path is {shown}, so the results would replace the inputs.")

    def read_written(self, on_result: Callable[[RowResult], object] = lambda result: None) -> WrittenResults:
        """
        Read what earlier tries have written, as a stream.

        :param on_result: called with each result, to count it.
        :return: which rows are over, and the latest checkpoint.
        :raises DifyError: if the storage fails.
        """
        written = WrittenResults(is_complete=self.is_merged)
        for path in [self._file] if written.is_complete else self._parts():
            for line in self._lines_of(path):
                result = RowResult.from_line(line)
                if result is None:
                    written.checkpoint = _join(written.checkpoint, Checkpoint.from_line(line))
                elif written.rows.add(result.index):
                    on_result(result)
        return written

    def begin(self, checkpoint: Checkpoint) -> None:
        """
        Write the batch's first checkpoint, before anything is started.

        :raises DifyConfigurationError: if another of the mapped tasks writes to the same file.
        :raises DifyError: if the storage fails.
        """
        self.write(Part([], checkpoint))
        # Looked for afterwards: of two that begin at once, one sees the other.
        beside = next((name for name in self._batches() if name.is_beside(self._name)), None)
        if beside is not None:
            with storage_errors(self._folder, "removed"):
                self._remove(self._folder)
            raise DifyConfigurationError(
                f"output_path is {one_line(redact(self.output_path, ()), 300)!r}, which is that of map index "
                f"{beside.map_index} of this task, too. Each mapped task needs a file of its own: put "
                "{{ ti.map_index }} into it. Nothing was started."
            )

    def write(self, part: Part) -> None:
        """
        Write a part.

        :raises DifyError: if the storage fails.
        """
        self._write(self._folder / part.name, [*(line for _, line in part.lines), part.checkpoint.to_line()])

    def merge(self, expected: int) -> None:
        """
        Write all results into the output file, in row order.

        Interrupted at any moment, it can be called again: the parts are still there.

        :param expected: how many rows the parts should have.
        :raises DifyError: if they have fewer, or if the storage fails.
        """
        if self.is_merged:
            return
        merged = 0

        def lines() -> Iterator[str]:
            nonlocal merged
            for _, line in merge_parts(self._streams()):
                merged += 1
                yield line

        self._write(self._file, lines())
        if merged < expected:
            raise DifyError(
                f"{expected - merged:,} of {expected:,} results are missing: parts in "
                f"{one_line(redact(str(self._folder), ()), 300)} were removed or cut while the batch ran. "
                f"{one_line(redact(self.output_path, ()), 300)} has the others. A retry reads the missing ones from "
                "Dify's log."
            )
        # From now on the parts may go: which of them are left says nothing any more.
        self._write(self._folder / _MERGED, [""])

    def remove_parts(self) -> None:
        """
        Remove the parts, after the merge, as the last thing that the batch does.

        What the same task has left from before it was cleared goes with them.

        :raises DifyError: if the storage fails.
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

    def _parts(self) -> list[Any]:
        """Return the parts, sorted by their first row."""
        with storage_errors(self._folder, "read"):
            found = _parts_in(self._folder)
        return sorted(found, key=lambda path: (int(path.name.partition("-")[0]), path.name))

    def _streams(self) -> list[tuple[int, Iterator[str]]]:
        # Generators: none is opened before its first line is asked for.
        return [(int(path.name.partition("-")[0]), self._lines_of(path)) for path in self._parts()]

    def _lines_of(self, path: Any) -> Iterator[str]:
        with (
            storage_errors(path, "read"),
            open_stream(path, "r", errors="replace", newline="\n", block_size=_MERGE_BUFFER) as file,
        ):
            while line := file.readline():
                yield line

    def _write(self, path: Any, lines: Iterable[str]) -> None:
        with storage_errors(path, "written"):
            try:
                file = open_stream(path, "w", newline="\n")
            except FileNotFoundError:
                # Only where folders have to be made.
                path.parent.mkdir(parents=True, exist_ok=True)
                file = open_stream(path, "w", newline="\n")
            with file:
                file.writelines(lines)


def _parts_in(folder: Any) -> list[Any]:
    return [path for path in folder.iterdir() if _PART_NAME.fullmatch(path.name)] if folder.exists() else []


def merge_parts(parts: Iterable[tuple[int, Iterator[str]]]) -> Iterator[tuple[int, str]]:
    """
    Merge sorted parts into one sequence in row order, each row once.

    :param parts: each part's first row and its lines, sorted by the first row; a part is read from when its first row
        is due.
    :return: row and line.
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
    )
