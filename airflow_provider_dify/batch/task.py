"""A batch as a task's try: its rows, its results and its XComs, from what the operator's arguments say."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import AirflowFailException

from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.output import FileOutput, Output, ReturnedOutput
from airflow_provider_dify.batch.progress import BatchProgress, FailureLimit
from airflow_provider_dify.batch.result_files import ResultFiles
from airflow_provider_dify.batch.resuming import EarlierTries
from airflow_provider_dify.batch.rows import count_rows, load_lazy
from airflow_provider_dify.batch.running import BatchRun, BatchSettings
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import Deadline
from airflow_provider_dify.tasks.loop import TaskLoop
from airflow_provider_dify.tasks.start import first_try_number

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context
    from airflow.sdk.types import Logger

# Seconds that the log is read back where no Dag run says when it began.
_WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True)
class TaskSettings:
    """What the operator's arguments say beside :class:`BatchSettings`, rendered."""

    user: str | None
    output_path: str | None
    max_failed_runs: float
    retries: int


class BatchTask:
    """
    One try of the operator.

    :param batch: the operator's arguments for the runs.
    :param settings: the others.
    :param context: the running task's context.
    :param hook: the hook, whose connection counts.
    :param log: the task's log.
    :param push: pushes the XCom ``batch``.
    """

    def __init__(
        self,
        batch: BatchSettings,
        settings: TaskSettings,
        context: Context,
        hook: DifyHook,
        log: Logger,
        push: Callable[[dict[str, Any]], None],
    ) -> None:
        self._batch = batch
        self._settings = settings
        self._ti: Any = context["ti"]
        self._dag_run: Any = context.get("dag_run")
        self._hook = hook
        self._log = log
        self._push = push
        self._loop = TaskLoop()

    def run(self, on_app: Callable[[str], None]) -> Any:
        """
        Run the batch, or what earlier tries have left of it.

        :param on_app: called with the app's UUID, once a run has named it.
        :return: the path of the results; the results themselves without ``output_path``.
        :raises DifyBatchFailed: if more rows failed than may.
        :raises DifyError: as the operator does.
        """
        settings = self._settings
        batch = self._batch = replace(self._batch, inputs=load_lazy(self._batch.inputs))
        deadline = Deadline.after(batch.timeout, "batch's")
        users = RowUsers.of_task(self._ti, settings.user)
        total = count_rows(batch.inputs, batch.json_columns)
        progress = BatchProgress(
            total,
            FailureLimit(settings.max_failed_runs),
            began_at=time.time(),
            fail_on_partial_success=batch.row.wait.fail_on_partial_success,
            output_path=settings.output_path,
        )
        output = self._output(total, progress)
        self._push(progress.summary(time.time()))
        if progress.over:
            self._log.info("%d of %d rows are over already, by an earlier try.", progress.over, total)
        try:
            if progress.over < total and not output.is_complete:
                self._loop.run(self._run_rows(batch, users, output, progress, deadline, on_app))
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

    async def _run_rows(
        self,
        batch: BatchSettings,
        users: RowUsers,
        output: Output,
        progress: BatchProgress,
        deadline: Deadline,
        on_app: Callable[[str], None],
    ) -> None:
        async with self._hook.client_on(self._loop) as client:
            await BatchRun(
                batch,
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

    @property
    def _will_be_retried(self) -> bool:
        return bool(self._ti.try_number <= (self._ti.max_tries or 0))

    def _output(self, total: int, progress: BatchProgress) -> Output:
        began = getattr(self._dag_run, "start_date", None)
        since = began.timestamp() if isinstance(began, datetime) else time.time() - _WEEK
        number = self._ti.try_number - first_try_number(self._ti, self._settings.retries)
        earlier = EarlierTries(since, self._ti.try_number > 1, number)
        path = self._settings.output_path
        if path is None:
            return ReturnedOutput(total, earlier)
        files = ResultFiles(path, BatchName.of_task(self._ti))
        files.check(self._batch.inputs)
        return FileOutput(files, self._batch.max_active_runs, progress, earlier)
