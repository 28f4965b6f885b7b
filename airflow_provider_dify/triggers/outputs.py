"""The XComs that a trigger pushes for its task, which may never see a worker again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.models import WorkflowRun
from airflow_provider_dify.exceptions import DifyError
from airflow_provider_dify.runs.waiting import TriggerWait
from airflow_provider_dify.tasks.xcoms import RUN_LOG, check_outputs, run_log_url, xcoms_from_run

if TYPE_CHECKING:
    from airflow.sdk.types import Logger


@dataclass(frozen=True)
class TriggerXComs:
    """The XComs that a trigger pushes for its task."""

    task_instance: Any  # None where Airflow gave the trigger none
    wait: TriggerWait
    log: Logger

    async def push_link(self, run: WorkflowRun, connection: DifyConnection | None) -> None:
        """Push the XCom of the link, which no worker may ever see."""
        if not (self.wait.do_xcom_push and CAN_END_FROM_TRIGGER and run.app_id and connection is not None):
            return
        if self.task_instance is not None:
            await self._push({RUN_LOG: run_log_url(connection, run.app_id)}, run.id)

    async def push_outputs(self, run: WorkflowRun) -> bool:
        """
        Push the XComs of a run that succeeded; return whether that worked, else a worker has to end the task. Not as
        part of the event that ends the task: Airflow 3.2 keeps the XComs of that as text within JSON, so that the next
        task gets a text where it should get a dict.
        """
        if not self.wait.do_xcom_push:
            return True
        try:
            check_outputs(run)
        except DifyError:
            # Logged by a worker, in the task's own log.
            return False
        return await self._push(xcoms_from_run(run, multiple_outputs=self.wait.multiple_outputs), run.id)

    async def _push(self, xcoms: dict[str, Any], run_id: str) -> bool:
        from airflow.providers.common.compat.sdk import XCom
        from asgiref.sync import sync_to_async

        ti = self.task_instance
        try:
            for key, value in xcoms.items():
                await sync_to_async(XCom.set)(
                    key=key, value=value, dag_id=ti.dag_id, task_id=ti.task_id, run_id=ti.run_id, map_index=ti.map_index
                )
        except Exception:
            self.log.warning(
                "The XComs of Dify workflow run %s could not be pushed from the triggerer; a worker will do it.",
                run_id,
                exc_info=True,
            )
            return False
        return True
