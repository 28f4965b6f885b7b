"""Where a batch's results go while it runs: into parts of a file, or into the task's return value."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import Any

from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.result_files import ResultFiles
from airflow_provider_dify.batch.results import Checkpoint, PartBuffer, ReturnedResults, RowResult, RowSet


@dataclass(frozen=True)
class EarlierTries:
    """
    What earlier tries of a task may have started, as far as Airflow knows.

    :param since: epoch seconds from which on Dify's log may have runs of the batch.
    :param can_be: whether this is no task's first try.
    :param number: how many there seem to have been since the task was cleared; a Dag whose ``retries`` were lowered may
        mislead.
    """

    since: float
    can_be: bool
    number: int

    @property
    def is_first_try(self) -> bool:
        """Whether this seems to be the first try since the task was cleared."""
        return self.number == 0


class ReturnedOutput:
    """
    Results that are the task's return value. An earlier try's are read from Dify again.

    :param total: rows of the batch.
    :param earlier: what earlier tries may have started.
    :ivar remembers_stops: whether a retry knows which runs were stopped, whatever their records say.
    """

    remembers_stops = False
    is_complete = False
    checkpoint: Checkpoint | None = None
    last_written = -1

    def __init__(self, total: int, earlier: EarlierTries) -> None:
        self.since = earlier.since
        self.reads_log = earlier.can_be
        self.is_first_try = earlier.is_first_try
        self.earlier_tries = earlier.number
        self._results = ReturnedResults(total)

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return False

    async def begin(self, last_uncertain: int) -> None:
        """
        Be ready for the first start.

        :param last_uncertain: the last row that an earlier try may have started; -1 for none.
        """

    def open(self, row: int, started_at: float) -> None:
        """Take note of a row that is about to be started, or was started by an earlier try."""

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
        self.checkpoint = written.checkpoint
        self.last_written = written.rows.last
        self.is_complete = written.is_complete
        # The first part is written before anything is started. Without it an earlier try may have started all the same:
        # it may have removed the parts at its end, or written them on another worker's disk.
        self.reads_log = written.checkpoint is not None or earlier.can_be
        self.is_first_try = written.checkpoint is None and earlier.is_first_try
        self.earlier_tries = earlier.number
        self.since = earlier.since if self.reads_log else time.time()
        if written.checkpoint is not None and not written.is_damaged:
            self.since = written.checkpoint.open_since
        self._buffer = PartBuffer(max_active_runs, self.since, len(written.rows))
        self._writing: asyncio.Task[None] | None = None
        self._is_broken = False

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return row in self._rows

    async def begin(self, last_uncertain: int) -> None:
        """
        Write the first part, before anything is started.

        :param last_uncertain: the last row that an earlier try may have started; -1 for none.
        """
        self._buffer.last_uncertain = last_uncertain
        if self.checkpoint is None:
            checkpoint = Checkpoint(self.since, self._buffer.max_active_runs)
            await asyncio.to_thread(self._files.begin, checkpoint)

    def open(self, row: int, started_at: float) -> None:
        """Take note of a row that is about to be started, or was started by an earlier try."""
        self._buffer.open(row, started_at)

    def add(self, result: RowResult) -> None:
        """Take a row's result."""
        self._buffer.add(result, time.time(), is_logged=result.workflow_run_id is not None)

    async def write_if_due(self) -> None:
        """
        Write a part, if one is due, while the runs go on.

        :raises DifyError: if the storage failed.
        """
        if self._writing is not None and self._writing.done():
            await self._end_writing()
        if self._writing is None and not self._is_broken and self._buffer.is_due(time.time()):
            part = self._buffer.take(time.time())
            self._writing = asyncio.get_running_loop().create_task(asyncio.to_thread(self._files.write, part))

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
        await asyncio.to_thread(self._files.write, self._buffer.take(time.time(), stopped_runs))

    async def _end_writing(self) -> None:
        writing, self._writing = self._writing, None
        assert writing is not None  # noqa: S101
        try:
            await writing
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
