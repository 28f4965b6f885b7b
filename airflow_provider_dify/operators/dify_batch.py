# SPDX-License-Identifier: Apache-2.0
"""Run a Dify workflow over many rows in one task."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.providers.common.compat.sdk import BaseOperator

from airflow_provider_dify.exceptions import DifyConfigurationError, TaskErrors
from airflow_provider_dify.links.dify import UI_COLOR, UI_FGCOLOR, DifyWorkflowRunLink
from airflow_provider_dify.tasks.arguments import parse_count, parse_limit, parse_seconds
from airflow_provider_dify.tasks.xcoms import TaskXComs

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.batch.running import BatchTask
    from airflow_provider_dify.hooks.dify import DifyHook

BATCH = "batch"
# Each run holds a connection, and what its events bring, in one process.
MAX_ACTIVE_RUNS = 1000


class DifyRunWorkflowBatchOperator(BaseOperator):
    """
    Run a Dify workflow once for each of many rows, in one task, and keep what each run returned.

    Runs start in row order, at most ``max_active_runs`` at once, and are followed by their events, or polled where
    these break off. Dify's "too many requests" halves their number for a while. A run that fails is started again up to
    ``run_retries`` times, not one that was stopped or rejected. A 5xx, a reset or a stall costs a retry, not the batch.

    A result has ``index, status, outputs, error, workflow_run_id, total_tokens, elapsed_time, attempts``. With
    ``output_path`` they are written there as JSON Lines in row order: in parts while the batch runs, which are merged
    at its end. Without it they are the return value, of at most 1,000 rows and 1 MB. The XCom ``batch`` has the counts,
    from the start on: ``total, succeeded, partial_succeeded, failed, stopped, total_tokens, elapsed_time,
    output_path``.

    A start that may have arrived is not sent again by the same try. Its run is looked for in Dify's log during
    ``not_found_grace``, and once more at the batch's end; a row whose run does not come up has failed. After a crash
    or an Airflow retry, rows whose results are written are not asked for again. For the others that may have been
    started, Dify's log is asked: the ``user`` of a run names the row and the attempt. What is over is read, what is
    alive is followed, and the rest is started. Rows that may have been under way at the crash are looked for during
    ``not_found_grace`` first. One window is left: a run that is not in the log when the grace is over, because it was
    queued at the crash and still is, or because the server writes its log late. Such a row runs, and is paid for,
    twice. A task that is cleared starts from scratch.

    :param inputs: a list of dicts; or the path or URL of a file (``.jsonl``, ``.ndjson``, ``.csv``), as Airflow's
        object storage takes it; or :meth:`DifyFile.each <airflow_provider_dify.files.DifyFile.each>`. Templated.
    :param max_active_runs: how many runs there are at once, up to 1,000.
    :param output_path: path or URL of the results' file; ``None`` for a return value. Templated.
    :param max_failed_runs: how many rows may fail: a number, or a share such as ``0.05``. The task fails without retry
        as soon as more have failed and the active runs are over.
    :param run_retries: how often a run that failed is started again.
    :param max_total_tokens: how many tokens the runs may use. Once they have used more, no more are started; the task
        fails when those under way are over, and its next try continues, if the limit was raised. No limit by default.
    :param json_columns: columns of a CSV file whose cells are JSON. An empty cell of a CSV file is no input.
    :param file_columns: inputs whose text is the path or URL of a file to upload. In JSON Lines an object with
        ``$file`` is one, too, and in a list of dicts a :class:`~airflow_provider_dify.files.DifyFile`.
    :param output_files: path or URL of a folder, in which the files among the outputs are saved; ``{index}`` in it is
        the row's number, and without that each row has a folder of this name in it. Templated.
    :param user: a name in front of each run's ``user``; by default one that names Airflow installation, Dag, task, Dag
        run and map index. Templated.
    :param dify_conn_id: the Airflow connection of type ``dify``. Templated.
    :param workflow_id: UUID of a published version of the workflow; the current one by default. Templated.
    :param trace_session_id: the session of all runs in Dify's tracing, as for the operator. Templated.
    :param fail_on_partial_success: whether a ``partial-succeeded`` run counts as failed.
    :param timeout: seconds (or a ``timedelta``) for the batch; seven days by default. What runs then is stopped.
    :param run_timeout: seconds since a run's creation after which it is stopped and counts as failed.
    :param progress_interval: seconds between the lines that say how far the batch is.
    :param poll_interval: seconds between polls of a run whose events broke off.
    :param not_found_grace: seconds for which a run is looked for that may have been started.
    :param max_consecutive_failures: polls of a run, or a retry's looks into the log, that may fail in a row for a
        passing reason.
    :param restart_lost_runs: let ``run_retries`` start another run where a start got lost: no event stream began, and
        Dify's log, which could be read all the time, showed no run during ``not_found_grace``. The first one may still
        be in Dify's queue, and be paid for, too. By default such a row fails.
    :raises DifyBatchFailed: if more rows failed than ``max_failed_runs``.
    :raises DifyTokenLimitReached: if rows are left because the runs have used more than ``max_total_tokens``.
    :raises DifyConfigurationError: if the rows can't be read, or are too many for a return value; or if ``output_path``
        can't be used.
    :raises DifyOutputsError: if the results are too much for a return value, or Airflow can't store one of them.
    :raises DifyWorkflowRunTimeout: if ``timeout`` is over.
    :raises DifyConnectionError: if Dify can't be reached for long; a retry continues the batch.
    :raises DifyError: if parts of the results were removed meanwhile, which a retry corrects; any other, as
        :class:`~airflow_provider_dify.operators.dify.DifyRunWorkflowOperator` does.
    """

    template_fields: Sequence[str] = (
        "inputs",
        "output_path",
        "output_files",
        "user",
        "workflow_id",
        "dify_conn_id",
        "trace_session_id",
    )
    template_fields_renderers = {"inputs": "json"}  # noqa: RUF012
    ui_color = UI_COLOR
    ui_fgcolor = UI_FGCOLOR
    operator_extra_links: tuple[DifyWorkflowRunLink, ...] = (DifyWorkflowRunLink(),)

    def __init__(
        self,
        *,
        inputs: Any,
        max_active_runs: int = 8,
        output_path: str | os.PathLike[str] | None = None,
        max_failed_runs: float = 0,
        run_retries: int = 0,
        max_total_tokens: int | None = None,
        json_columns: Sequence[str] | None = None,
        file_columns: Sequence[str] | None = None,
        output_files: str | os.PathLike[str] | None = None,
        user: str | None = None,
        dify_conn_id: str = "dify_default",
        workflow_id: str | None = None,
        trace_session_id: str | None = None,
        fail_on_partial_success: bool = False,
        timeout: timedelta | float = timedelta(days=7),
        run_timeout: timedelta | float | None = None,
        progress_interval: timedelta | float = 30,
        poll_interval: timedelta | float = 10,
        not_found_grace: timedelta | float = 60,
        max_consecutive_failures: int = 5,
        restart_lost_runs: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.inputs = inputs
        self.max_active_runs = parse_count("max_active_runs", max_active_runs)
        if not 1 <= self.max_active_runs <= MAX_ACTIVE_RUNS:
            raise DifyConfigurationError(
                f"max_active_runs must be a whole number from 1 to {MAX_ACTIVE_RUNS:,}, but it is {max_active_runs:,}."
            )
        self.output_path = output_path
        self.max_failed_runs = parse_limit("max_failed_runs", max_failed_runs)
        self.run_retries = parse_count("run_retries", run_retries)
        self.max_total_tokens = None if max_total_tokens is None else parse_count("max_total_tokens", max_total_tokens)
        self.json_columns = _parse_columns("json_columns", json_columns)
        self.file_columns = _parse_columns("file_columns", file_columns)
        self.output_files = output_files
        self.user = user
        self.dify_conn_id = dify_conn_id
        self.workflow_id = workflow_id
        self.trace_session_id = trace_session_id
        self.fail_on_partial_success = fail_on_partial_success
        self.timeout = parse_seconds("timeout", timeout)
        self.run_timeout = None if run_timeout is None else parse_seconds("run_timeout", run_timeout)
        self.progress_interval = parse_seconds("progress_interval", progress_interval)
        self.poll_interval = parse_seconds("poll_interval", poll_interval)
        self.not_found_grace = parse_seconds("not_found_grace", not_found_grace)
        self.max_consecutive_failures = parse_count("max_consecutive_failures", max_consecutive_failures)
        self.restart_lost_runs = restart_lost_runs
        # What on_kill, which has no arguments, has to look at.
        self._batch: BatchTask | None = None

    @cached_property
    def hook(self) -> DifyHook:
        """The hook whose connection the link leads to."""
        from airflow_provider_dify.hooks.dify import DifyHook

        return DifyHook(self.dify_conn_id)

    def execute(self, context: Context) -> Any:
        """
        Run the batch.

        :return: ``output_path``; without it the results, a list in row order.
        """
        # Imported when a task runs: the scheduler, which only parses the Dag, never needs an HTTP client.
        from airflow_provider_dify.api.run_stream import start_extras
        from airflow_provider_dify.batch.row import BatchSettings
        from airflow_provider_dify.batch.running import BatchTask
        from airflow_provider_dify.runs.waiting import WaitArguments

        settings = BatchSettings(
            inputs=self.inputs,
            wait=WaitArguments.of_task(self),
            max_active_runs=self.max_active_runs,
            timeout=self.timeout,
            output_path=None if self.output_path is None else str(self.output_path),
            max_failed_runs=self.max_failed_runs,
            run_retries=self.run_retries,
            max_total_tokens=self.max_total_tokens,
            json_columns=self.json_columns,
            file_columns=self.file_columns,
            output_files=None if self.output_files is None else str(self.output_files),
            user=self.user,
            workflow_id=self.workflow_id,
            progress_interval=self.progress_interval,
            restart_lost_runs=self.restart_lost_runs,
            retries=self.retries or 0,
            extras=start_extras(trace_session_id=self.trace_session_id),
        )
        ti: Any = context["ti"]
        xcoms = TaskXComs(self, context)

        def push(summary: dict[str, Any]) -> None:
            if self.do_xcom_push:
                ti.xcom_push(key=BATCH, value=summary)

        self._batch = BatchTask(settings, context, self.hook, self.log, push)
        with TaskErrors(self.log), self.hook:
            return self._batch.run(xcoms.push_link)

    def on_kill(self) -> None:
        """Stop the active runs, when the task is killed."""
        if self._batch is not None:
            self._batch.kill()


def _parse_columns(argument: str, columns: Any) -> tuple[str, ...]:
    if columns is None:
        return ()
    if not isinstance(columns, (list, tuple)) or not all(isinstance(name, str) and name for name in columns):
        raise DifyConfigurationError(f"{argument} must be a list of column names, or None: {columns!r:.100}")
    return tuple(columns)
