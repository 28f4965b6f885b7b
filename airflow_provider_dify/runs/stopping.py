# SPDX-License-Identifier: Apache-2.0
"""How a run is stopped, within the seconds that Airflow leaves to a task that it kills."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.models import WorkflowRun, WorkflowRunStatus, is_server_from
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.runs.log import RunSearch, find_run

if TYPE_CHECKING:
    from airflow_provider_dify.api.client import DifyClient

# Airflow 3 kills a task's process 5 seconds after on_kill began: two attempts, a pause, a look.
STOP_TIMEOUT = 1.5
_PAUSE = 1.0
# Measured on Dify 1.16.1: the detail is `stopped` 0.2 to 0.3 seconds after the stop.
_PAUSE_BEFORE_LOOK = 0.4
_SECONDS_FOR_TASK_ID = 1.5


@dataclass(frozen=True)
class StopReport:
    """What became of a stop: whether Dify took the request, a sentence for the log, and whether the run may go on."""

    was_asked: bool
    message: str
    is_warning: bool = False


async def stop_run(client: DifyClient, workflow_run_id: str, task_id: str | None, user: str) -> StopReport:
    """Stop a run of which maybe only the run's id is known, and look once what came of it; raises no DifyError."""
    task_id = task_id or await client.read_task_id(workflow_run_id, user, _SECONDS_FOR_TASK_ID)
    if task_id is None:
        return StopReport(
            False,
            f"Workflow run {workflow_run_id} goes on: its task id, which Dify's stop route takes, is not known.",
            is_warning=True,
        )
    try:
        await _ask_twice(client, task_id, user)
    except DifyError as error:
        return StopReport(False, f"Workflow run {workflow_run_id} could not be stopped and goes on: {error}", True)
    await asyncio.sleep(_PAUSE_BEFORE_LOOK)
    run: WorkflowRun | None = None
    with suppress(DifyError):
        run = await client.perform(calls.run_detail(workflow_run_id))
    return _report(workflow_run_id, run, client.server_version)


async def stop_queued(client: DifyClient, search: RunSearch, task_id: str | None) -> StopReport:
    """Stop a run that Dify has not named yet, if its log does; raises no DifyError."""
    run_id: str | None = None
    if search.user_is_unique:
        with suppress(DifyError):
            run_id = await find_run(client, search)
    if run_id is None:
        return StopReport(
            False,
            f"The workflow run of user {search.user!r} is queued, and Dify stops no queued run: it runs later. Look "
            "for the user in the app's log in Dify's console.",
            is_warning=True,
        )
    return await stop_run(client, run_id, task_id, search.user)


async def _ask_twice(client: DifyClient, task_id: str, user: str) -> None:
    try:
        await client.perform(calls.stop_task(task_id, user))
    except DifyError:
        await asyncio.sleep(_PAUSE)
        await client.perform(calls.stop_task(task_id, user))


def _report(workflow_run_id: str, run: WorkflowRun | None, server_version: str | None) -> StopReport:
    if run is not None and run.status == WorkflowRunStatus.PAUSED:
        return StopReport(
            True,
            f"Workflow run {workflow_run_id} is paused, and Dify does not stop a paused run: it waits for a person "
            "still.",
            is_warning=True,
        )
    if run is not None and run.finished_at is not None:
        return StopReport(True, f"Dify stopped workflow run {workflow_run_id} (status {run.status}).")
    if is_server_from(server_version, (1, 16)):
        return StopReport(True, f"Asked Dify to stop workflow run {workflow_run_id}; its record does not show it yet.")
    return StopReport(
        True,
        f"Asked Dify to stop workflow run {workflow_run_id}. Whether it did may not show: up to Dify 1.15 the run's "
        "record can stay running for ever.",
    )
