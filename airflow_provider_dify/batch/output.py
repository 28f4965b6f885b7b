"""Where a batch's results go while it runs: into parts of a file, or into the task's return value."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.result_files import ResultFiles
from airflow_provider_dify.batch.results import Checkpoint, PartBuffer, ReturnedResults, RowResult, RowSet


class ReturnedOutput:
    """
    Results that are the task's return value. An earlier try's are read from Dify again.

    :param total: rows of the batch.
    :param since: epoch seconds from which on Dify's log may have runs of the batch.
    :param is_fresh: whether no earlier try can have started anything.
    :ivar remembers_stops: whether a retry knows which runs were stopped, whatever their records say.
    """

    remembers_stops = False
    is_complete = False
    checkpoint: Checkpoint | None = None
    last_written = -1

    def __init__(self, total: int, *, since: float, is_fresh: bool) -> None:
        self.since = since
        self.is_fresh = is_fresh
        self._results = ReturnedResults(total)

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return False

    async def begin(self) -> None:
        """Be ready for the first start."""

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

    :param output_path: where they are to be.
    :param batch_id: names the batch, for its parts.
    :param max_active_runs: how many rows may be under way at once.
    :param progress: counts the results of earlier tries.
    """

    remembers_stops = True

    def __init__(self, output_path: str, batch_id: str, max_active_runs: int, progress: BatchProgress) -> None:
        self._output_path = output_path
        self._files = ResultFiles(output_path, batch_id)
        written = self._files.read_written(progress.add)
        self._rows: RowSet = written.rows
        self.checkpoint = written.checkpoint
        self.last_written = written.rows.last
        self.is_complete = written.is_complete
        # The first part is written before anything is started.
        self.is_fresh = written.checkpoint is None
        self.since = time.time() if written.checkpoint is None else written.checkpoint.open_since
        self._buffer = PartBuffer(max_active_runs, self.since)
        self._writing: asyncio.Task[None] | None = None

    def has(self, row: int) -> bool:
        """Return whether a row's result is there already."""
        return row in self._rows

    async def begin(self) -> None:
        """Write the first part, before anything is started."""
        if self.is_fresh:
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
            writing, self._writing = self._writing, None
            await writing
        if self._writing is None and self._buffer.is_due(time.time()):
            part = self._buffer.take(time.time())
            self._writing = asyncio.get_running_loop().create_task(asyncio.to_thread(self._files.write, part))

    async def flush(self, stopped_runs: tuple[str, ...]) -> None:
        """Write what is not written yet, at the end of a try."""
        if self._writing is not None:
            await self._writing
            self._writing = None
        await asyncio.to_thread(self._files.write, self._buffer.take(time.time(), stopped_runs))

    def finish(self) -> Any:
        """Merge the parts into the file, and return its path."""
        self._files.merge()
        return self._output_path

    def remove_parts(self) -> None:
        """Remove what only a further try needs."""
        self._files.remove_parts()


Output = ReturnedOutput | FileOutput
