# SPDX-License-Identifier: Apache-2.0
"""Wait in a task for a Dify workflow run that nobody has the id of."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.runs.wanted import LatestRunSearch, RunFilter, parse_time
from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor

if TYPE_CHECKING:
    from airflow.providers.common.compat.sdk import Context

    from airflow_provider_dify.api.models import WorkflowRun
    from airflow_provider_dify.runs.waiting import TriggerWait
    from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger


class DifyLatestWorkflowRunSensor(DifyWorkflowRunSensor):
    """
    Wait until a run of a Dify app that fits has ended, whoever started it, and pass its outputs to the next task.

    Such as a run of Dify's own schedule: ``created_after="{{ data_interval_start }}", triggered_from="schedule"``. Of
    several that have ended already it takes the latest. What it returns, when it fails, and how it waits is as for
    :class:`~airflow_provider_dify.sensors.dify.DifyWorkflowRunSensor`, whose other arguments it takes. A run that
    failed or was stopped fails the task, unless ``statuses`` leaves such runs out.

    :param created_after: only runs that were created at this moment or later, by Dify's clock: a ``datetime`` or the
        ISO 8601 text of one, UTC if it names no time zone. Templated.
    :param user: only runs of this ``user`` of the API; ``nightly-*`` for all users that begin with ``nightly-``.
        Templated.
    :param triggered_from: only runs that were started so: ``app-run`` (API and web app), ``webhook``, ``schedule``,
        ``plugin``; one or several.
    :param statuses: only runs that ended so: ``succeeded``, ``partial-succeeded``, ``failed``, ``stopped``. Any end by
        default.
    :param run_timeout: seconds (or a ``timedelta``) since a run's creation after which it is no longer watched. No
        limit by default.
    :param kwargs: as for the other sensor, but for ``workflow_run_id`` and ``start_from_trigger``.
    :raises DifyConfigurationError: if an argument can't work.
    :raises DifyError: as the other sensor does.
    """

    template_fields: Sequence[str] = ("created_after", "user", "dify_conn_id", "output_files")

    def __init__(
        self,
        *,
        created_after: datetime | str,
        user: str | None = None,
        triggered_from: str | Sequence[str] | None = None,
        statuses: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        if kwargs.get("start_from_trigger") or "workflow_run_id" in kwargs:
            raise DifyConfigurationError(
                "DifyLatestWorkflowRunSensor takes neither start_from_trigger nor workflow_run_id."
            )
        super().__init__(workflow_run_id="", **kwargs)
        self.created_after = created_after
        self.user = user
        # The user may be a template still.
        self.filter = RunFilter.parse(statuses=statuses, triggered_from=triggered_from, user=None)
        self._search: LatestRunSearch | None = None

    @property
    def search(self) -> LatestRunSearch:
        """
        What the running task looks for, and what it has read so far.

        :raises DifyConfigurationError: if an argument can't work, as rendered.
        """
        if self._search is None:
            user = RunFilter.parse(statuses=None, triggered_from=None, user=self.user).user
            self._search = LatestRunSearch(
                parse_time("created_after", self.created_after),
                replace(self.filter, user=user),
                self.poke_interval,
                self.run_timeout,
            )
        return self._search

    def execute_complete(
        self, context: Context, event: Any = None, deadline: float | None = None, **_: Any
    ) -> dict[str, Any] | None:
        """
        Continue after the triggerer's wait, with the run that it found.

        :param event: the trigger's event.
        :param deadline: epoch seconds at which the wait was to give up.
        :return: the run's outputs.
        """
        if isinstance(event, dict):
            self.workflow_run_id = str(event.get("workflow_run_id") or "")
        return super().execute_complete(context, event, deadline)

    def _read_run(self) -> WorkflowRun | None:
        if not self.workflow_run_id:
            run_id = self.hook.run_on_loop(lambda client: self.search.look(client, time.time()))
            if run_id is None:
                return None
            self.log.info("Dify's log names the run: workflow run %s.", run_id)
            self.workflow_run_id = run_id
            if self._wait is not None:
                self._wait.workflow_run_id = run_id
        return super()._read_run()

    def _trigger(self, wait: TriggerWait) -> DifyWorkflowRunTrigger:
        from airflow_provider_dify.triggers.dify import DifyLatestWorkflowRunTrigger

        if self.workflow_run_id:
            return super()._trigger(wait)
        wait = replace(wait, search=self.search.serialize())
        return DifyLatestWorkflowRunTrigger(None, self.dify_conn_id, **wait.serialize())

    def _timed_out(self, last_seen: str, why: str | None = None) -> str:
        if not self.workflow_run_id:
            last_seen = f"There was not {self.search.describe()}."
        return super()._timed_out(last_seen, why)
