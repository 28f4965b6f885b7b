# SPDX-License-Identifier: Apache-2.0
"""A batch as a task's try: its rows, its results and its XComs, from what the operator's arguments say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.output import FileOutput, Output, ResultFiles, ReturnedOutput
from airflow_provider_dify.batch.progress import BatchProgress, FailureLimit
from airflow_provider_dify.batch.resuming import EarlierTries
from airflow_provider_dify.batch.row import BatchSettings
from airflow_provider_dify.batch.rows import count_rows, load_lazy
from airflow_provider_dify.batch.running import BatchRun
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import Deadline
from airflow_provider_dify.tasks.loop import TaskLoop
from airflow_provider_dify.tasks.start import earliest_start, first_try_number

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger


class BatchTask:
    """One try of the operator, with the hook whose connection counts; ``push`` pushes the XCom ``batch``."""

    def __init__(
        self,
        settings: BatchSettings,
        context: Context,
        hook: DifyHook,
        log: Logger,
        push: Callable[[dict[str, Any]], None],
    ) -> None:
        self._settings = settings
        self._context: Any = context
        self._ti: Any = context["ti"]
        self._hook = hook
        self._log = log
        self._push = push
        self._loop = TaskLoop()

    def run(self, on_app: Callable[[str], None]) -> Any:
        """
        Run the batch, or what earlier tries have left of it; return and raise what the operator does. ``on_app`` gets
        the app's UUID, once a run has named it.
        """
        settings = self._settings = replace(self._settings, inputs=load_lazy(self._settings.inputs))
        deadline = Deadline.after(settings.timeout, "batch's")
        users = RowUsers.of_task(self._ti, settings.user)
        total = count_rows(settings.inputs, settings.json_columns)
        progress = BatchProgress(
            total,
            FailureLimit(settings.max_failed_runs),
            began_at=time.time(),
            fail_on_partial_success=settings.wait.fail_on_partial_success,
            output_path=settings.output_path,
            max_total_tokens=settings.max_total_tokens,
        )
        output = self._output(total, progress)

        async def run_rows() -> None:
            # A start that gets lost with a kept connection is looked for in the log, and no row is lost with it.
            async with self._hook.client_on(self._loop, keeps_connections=True) as client:
                await BatchRun(
                    settings,
                    client,
                    self._loop,
                    users,
                    output,
                    progress,
                    deadline,
                    self._log,
                    on_app,
                    will_be_retried=self._will_be_retried,
                ).run()

        self._push(progress.summary(time.time()))
        if progress.over:
            self._log.info("%d of %d rows are over already, by an earlier try.", progress.over, total)
        try:
            if progress.over < total and not output.is_complete:
                self._loop.run(run_rows())
        except BaseException as error:
            is_last = isinstance(error, AirflowFailException) or not self._will_be_retried
            # No other try comes, so what is there is written all the same.
            if is_last and progress.over:
                with contextlib.suppress(DifyError):
                    output.finish()
                    output.remove_parts()
            raise
        finally:
            self._push(progress.summary(time.time()))
        self._log.info("%s", progress.line(0, time.time()))
        result = output.finish()
        try:
            progress.raise_if_failed(time.time())
        finally:
            output.remove_parts()
        return result

    def kill(self) -> None:
        """Stop what runs, because Airflow ends the task."""
        self._loop.kill()

    @property
    def _will_be_retried(self) -> bool:
        return bool(self._ti.try_number <= (self._ti.max_tries or 0))

    def _output(self, total: int, progress: BatchProgress) -> Output:
        since = earliest_start(self._context)
        number = self._ti.try_number - first_try_number(self._ti, self._settings.retries)
        earlier = EarlierTries(since, self._ti.try_number > 1, number)
        path = self._settings.output_path
        if path is None:
            return ReturnedOutput(total, earlier)
        files = ResultFiles(path, BatchName.of_task(self._ti))
        files.check(self._settings.inputs)
        return FileOutput(files, self._settings.max_active_runs, progress, earlier)
