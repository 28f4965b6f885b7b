"""How the runs of a batch are stopped, all at once, within the seconds that Airflow leaves to a task that it kills."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from airflow_provider_dify.batch.row_run import RowRun
from airflow_provider_dify.runs.stopping import StopReport, stop_run

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

    from airflow_provider_dify.hooks.dify_async import DifyAsyncHook

# Airflow 3 kills a task's process 5 seconds after on_kill began.
SECONDS_TO_STOP = 3.5
# For starts that are under way.
_SECONDS_TO_BE_NAMED = 2.0


async def stop_runs(hook: DifyAsyncHook, runs: Iterable[RowRun], log: Logger) -> tuple[str, ...]:
    """
    Ask Dify to stop the runs of rows, and log what came of it.

    :param hook: the hook.
    :param runs: the rows.
    :param log: the task's log.
    :return: UUIDs of the runs that Dify was asked to stop.
    """
    stops = [asyncio.get_running_loop().create_task(_stop(hook, run)) for run in runs]
    if not stops:
        return ()
    done, late = await asyncio.wait(stops, timeout=SECONDS_TO_STOP)
    for stop in late:
        stop.cancel()
    reports = [found for stop in done if not stop.exception() and (found := stop.result())]
    stopped = tuple(run_id for run_id, report in reports if report.was_asked)
    for _, report in reports:
        if report.is_warning:
            log.warning("%s", report.message)
    log.info("Asked Dify to stop %d workflow runs, of %d rows that were under way.", len(stopped), len(stops))
    return stopped


async def _stop(hook: DifyAsyncHook, run: RowRun) -> tuple[str, StopReport] | None:
    until = time.monotonic() + _SECONDS_TO_BE_NAMED
    while run.is_starting and time.monotonic() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.05)
    run_id = run.workflow_run_id
    if run_id is None:
        return None
    return run_id, await hook.run_steps(stop_run(run_id, run.task_id, run.user, hook))
