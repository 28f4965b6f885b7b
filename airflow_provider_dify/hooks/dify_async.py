"""
Transport to Dify's Service API on an event loop: what :mod:`airflow_provider_dify.hooks.dify` does, awaited.

All hooks of one event loop with the same settings share one client session, so that a thousand waits on one triggerer
poll over a few kept-alive connections.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from airflow.providers.common.compat.connection import get_async_connection

from airflow_provider_dify.api.async_session import SharedSession
from airflow_provider_dify.api.responses import HttpAnswer, read_stop, read_workflow_run
from airflow_provider_dify.api.routes import (
    canonical_workflow_run_id,
    stop_path,
    workflow_run_path,
    workflow_run_subject,
)
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyAuthenticationError
from airflow_provider_dify.models import WorkflowRun

if TYPE_CHECKING:
    from types import TracebackType

# A run's inputs may be megabytes, and a triggerer has many waits.
MAX_BODY_KEPT = 32_768


class DifyAsyncHook:
    """
    Look workflow runs up on an event loop, with one app's API key. Never blocks the loop, never retries by itself.

    To be used as ``async with DifyAsyncHook() as hook: ...``, which takes and gives back its share of the session.

    :param dify_conn_id: the Airflow connection, as for :class:`airflow_provider_dify.hooks.dify.DifyHook`.
    :ivar connection: the connection's settings, as last read; ``None`` until then.
    """

    def __init__(self, dify_conn_id: str = "dify_default") -> None:
        self.dify_conn_id = dify_conn_id
        self.connection: DifyConnection | None = None
        self._session: SharedSession | None = None
        self._last_read: tuple[bytes, WorkflowRun] | None = None

    async def __aenter__(self) -> DifyAsyncHook:
        """
        Read the connection and open the session, if no one has.

        :raises DifyConfigurationError: if the connection cannot be used.
        """
        try:
            await self._connect()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the share of the session back; the last one out closes it."""
        session, self._session = self._session, None
        if session is not None:
            await session.leave()

    async def get_workflow_run(self, workflow_run_id: str) -> WorkflowRun:
        """
        Look a workflow run up: ``GET /workflows/run/{workflow_run_id}``. One request, or two if the key was rotated.

        :param workflow_run_id: the run's UUID, in any spelling that ``uuid.UUID`` takes.
        :return: the run, whatever its status.
        :raises DifyError: as :meth:`airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run` does.
        """
        run_id = canonical_workflow_run_id(workflow_run_id)
        try:
            return self._read(await self._send(run_id), run_id)
        except DifyAuthenticationError:
            refused = self.connection
            await self._connect()
            if self.connection == refused:
                raise
            return self._read(await self._send(run_id), run_id)

    def _read(self, answer: HttpAnswer, run_id: str) -> WorkflowRun:
        # While a run goes on, poll after poll brings the same bytes, and reading them is the dearest part of a poll.
        if self._last_read is not None and answer.status_code == 200 and answer.body == self._last_read[0]:
            return self._last_read[1]
        run = read_workflow_run(answer, run_id)
        self._last_read = (answer.body, run) if len(answer.body) <= MAX_BODY_KEPT else None
        return run

    async def stop_workflow_task(self, task_id: str, user: str) -> None:
        """
        Ask Dify to stop a running workflow, as :meth:`airflow_provider_dify.hooks.dify.DifyHook.stop_workflow_task`.

        :param task_id: the task's UUID, which the stream of the start told; not the run's.
        :param user: who started the run.
        :raises DifyError: as there.
        """
        assert self._session is not None  # noqa: S101
        path = stop_path(task_id)
        read_stop(await self._session.send("POST", path, f"the stop of task {task_id}", {"user": user}))

    async def _connect(self) -> None:
        """Read the connection, and take a share of the session that goes with it."""
        connection = DifyConnection.from_airflow(await get_async_connection(self.dify_conn_id))
        if self._session is None or connection != self.connection:
            await self.close()
            self._session = SharedSession.join(connection)
            self.connection = connection
            await self._session.open()

    async def _send(self, run_id: str) -> HttpAnswer:
        assert self.connection is not None  # noqa: S101
        assert self._session is not None  # noqa: S101
        return await self._session.send("GET", workflow_run_path(run_id), workflow_run_subject(run_id))
