"""Where a batch's results go while it runs: into parts of a file, or into the task's return value."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.result_files import ResultFiles
from airflow_provider_dify.batch.results import Checkpoint, PartBuffer, ReturnedResults, RowResult, RowSet
from airflow_provider_dify.batch.resuming import EarlierTries


class ReturnedOutput:
    """
    Results that are the task's return value. An earlier try's are read from Dify again.

    :param total: rows of the batch.
    :param earlier: what earlier tries may have started.
    :ivar remembers_stops: whether a retry knows which runs were stopped, whatever their records say.
    """

    remembers_stops = False
    is_complete = False

    def __init__(self, total: int, earlier: EarlierTries) -> None:
        self.earlier = earlier
        self._results = ReturnedResults(total)

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return False

    async def begin(self) -> None:
        """Be ready for the first start."""

    def on_untraced(self, row: int, *, is_lost: bool) -> None:
        """Take note of a row that was begun, and that Dify's log may not have."""

    def add(self, result: RowResult) -> None:
        """
        Take a row's result.

        :raises DifyOutputsError: if the results are too much for a return value.
        """
        self._results.add(result)

    async def write_if_due(self) -> None:
        """Write a part, if one is due."""

    async def flush(self, stopped_runs: tuple[str, ...]) -> None:
        """Write what is not written yet, at the end of a try."""

    def finish(self) -> Any:
        """Return the task's return value, once the batch is over."""
        return self._results.in_order()

    def remove_parts(self) -> None:
        """Remove what only a further try needs."""


class FileOutput:
    """
    Results that are written into a file, in parts first.

    :param files: where they are to be.
    :param max_active_runs: how many rows may be under way at once.
    :param progress: counts the results of earlier tries.
    :param earlier: what earlier tries may have started.
    """

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
        self._first = Checkpoint(max_active_runs, since=self.earlier.since)
        self._buffer = PartBuffer(replace(self._first, rows=len(written.rows)))
        # Rows that neither Dify's log nor a part has, and those of them that are being written.
        self._untraced = 0
        self._untraced_in_part = 0
        self._writing: asyncio.Task[None] | None = None
        self._is_broken = False

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return row in self._rows

    async def begin(self) -> None:
        """Write the first part, before anything is started."""
        if not self._has_begun:
            await asyncio.to_thread(self._files.begin, self._first)

    def add(self, result: RowResult) -> None:
        """Take a row's result."""
        self._buffer.add(result, time.time())

    def on_untraced(self, row: int, *, is_lost: bool) -> None:
        """Take note of a row that was begun, and that Dify's log may not have."""
        self._untraced += 1
        if is_lost:
            self._buffer.add_lost(row, time.time())

    async def write_if_due(self) -> None:
        """
        Write a part, if one is due, while the runs go on.

        A retry counts on it that no more rows than may run at once have left no trace. If they have, wait for the part.

        :raises DifyError: if the storage failed.
        """
        if self._writing is not None and (self._writing.done() or self._is_full):
            await self._end_writing()
        if self._writing is None and not self._is_broken and (self._is_full or self._buffer.is_due(time.time())):
            self._untraced, self._untraced_in_part = 0, self._untraced
            self._writing = asyncio.get_running_loop().create_task(
                asyncio.to_thread(self._files.write, self._buffer.take())
            )
            if self._is_full:
                await self._end_writing()

    @property
    def _is_full(self) -> bool:
        return self._untraced + self._untraced_in_part >= self._first.max_active_runs

    async def flush(self, stopped_runs: tuple[str, ...]) -> None:
        """
        Write what is not written yet, at the end of a try.

        :raises DifyError: if the storage failed.
        """
        if self._writing is not None:
            await self._end_writing()
        if self._is_broken:
            # A further part would say that the one that is missing is there.
            return
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
        """
        Merge the parts into the file, and return its path.

        :raises DifyError: if parts were removed, or if the storage failed.
        """
        self._files.merge(self._buffer.rows)
        return self._files.output_path

    def remove_parts(self) -> None:
        """Remove what only a further try needs."""
        self._files.remove_parts()


Output = ReturnedOutput | FileOutput
