"""Wait on the triggerer for the latest run of a Dify app that fits."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.runs.waiting import WaitEnd
from airflow_provider_dify.runs.wanted import LatestRunSearch
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger, load_client

if TYPE_CHECKING:
    from airflow.triggers.base import TriggerEvent


class DifyLatestWorkflowRunTrigger(DifyWorkflowRunTrigger):
    """
    Look until a run that fits has ended, and send one small event, as its base class does. The ``search`` of its
    arguments is what :meth:`~airflow_provider_dify.runs.wanted.LatestRunSearch.serialize` returns.
    """

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return the class and its arguments: JSON-ready values only, and no secret."""
        return "airflow_provider_dify.triggers.dify_latest.DifyLatestWorkflowRunTrigger", super().serialize()[1]

    async def _wait(self) -> TriggerEvent:
        search = LatestRunSearch.deserialize(self.wait.search or {})
        deadline = self._deadline()
        client = await asyncio.to_thread(load_client)
        async with client.DifyAsyncHook(self.dify_conn_id) as hook:
            run_id = await self._search(
                lambda: search.look(hook, time.time()), deadline, f"Waiting for {search.describe()}"
            )
            if run_id is None:
                return self._event(WaitEnd.TIMED_OUT, f"There was not {search.describe()}.")
            self.workflow_run_id = run_id
            return await self._poll_until_over(hook, run_id, deadline, at_once=True)
