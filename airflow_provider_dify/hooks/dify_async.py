"""What :mod:`airflow_provider_dify.hooks.dify` does, awaited, for the triggerer's event loop."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_dify.api import calls, routes
from airflow_provider_dify.api.async_session import SharedSession
from airflow_provider_dify.api.calls import Call, LiveTaskId, Pause, Steps
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.steps import Step, run_steps_async
from airflow_provider_dify.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyAuthenticationError
from airflow_provider_dify.hooks.shared_connection import read_connection
from airflow_provider_dify.models import LoggedWorkflowRun, WorkflowRun

if TYPE_CHECKING:
    from datetime import datetime
    from types import TracebackType

T = TypeVar("T")

# A run's inputs may be megabytes, and a triggerer has many waits.
MAX_BODY_KEPT = 32_768


class DifyAsyncHook:
    """
    Look workflow runs up on an event loop, with one app's API key. Never blocks the loop, never retries by itself.

    To be used as ``async with DifyAsyncHook() as hook: ...``, which takes and returns its share of the session.

    :param dify_conn_id: the Airflow connection, as for :class:`airflow_provider_dify.hooks.dify.DifyHook`.
    :ivar connection: the connection's settings, as last read; ``None`` until then.
    :ivar server_version: Dify's version, as its last response named it; ``None`` until then.
    """

    def __init__(self, dify_conn_id: str = "dify_default") -> None:
        self.dify_conn_id = dify_conn_id
        self.connection: DifyConnection | None = None
        self.server_version: str | None = None
        self._session: SharedSession | None = None
        self._last_run: tuple[str, bytes, WorkflowRun] | None = None

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
        """Return the share of the session; the last one out closes it."""
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
        return await self.run_steps(calls.look_up_run(routes.parse_workflow_run_id(workflow_run_id)))

    async def list_workflow_runs(
        self, *, user: str | None = None, created_after: datetime | None = None, page: int = 1, limit: int = 20
    ) -> list[LoggedWorkflowRun]:
        """
        List the app's workflow runs, as :meth:`airflow_provider_dify.hooks.dify.DifyHook.list_workflow_runs`.

        :raises DifyError: as there.
        """
        return await self.perform(calls.logged_runs(user=user, created_after=created_after, page=page, limit=limit))

    async def stop_workflow_task(self, task_id: str, user: str) -> None:
        """
        Ask Dify to stop a running workflow, as :meth:`airflow_provider_dify.hooks.dify.DifyHook.stop_workflow_task`.

        :param task_id: the task's UUID, which the stream of the start named; not the run's.
        :param user: who started the run.
        :raises DifyError: as there.
        """
        await self.perform(calls.stop_task(task_id, user))

    async def perform(self, call: Call[T]) -> T:
        """
        Send a request, again if the key was rotated, and return what its response means.

        :param call: the request.
        :raises DifyError: what the response means.
        """
        try:
            return self._parse(call, await self._send(call))
        except DifyAuthenticationError:
            refused = self.connection
            await self._connect(refused)
            if self.connection == refused:
                raise
            return self._parse(call, await self._send(call))

    async def run_steps(self, steps: Steps[T]) -> T:
        """
        Run requests that depend on each other, as :meth:`airflow_provider_dify.hooks.dify.DifyHook.run_steps`.

        :param steps: yields each request, and is sent what its response meant.
        :return: what the steps return.
        """
        return await run_steps_async(steps, self._take_step)

    async def _take_step(self, step: Step) -> Any:
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, LiveTaskId):
            with contextlib.suppress(Exception):
                assert self._session is not None  # noqa: S101
                return await asyncio.wait_for(self._session.read_live_task_id(step), step.seconds)
            return None
        return await self.perform(step)

    def _parse(self, call: Call[T], response: HttpResponse) -> T:
        self.server_version = response.server_version or self.server_version
        # While a run goes on, poll after poll brings the same bytes, and parsing them is the dearest part of a poll.
        last = self._last_run
        if last is not None and response.status_code == 200 and last[:2] == (call.path, response.body):
            return last[2]  # type: ignore[return-value]
        result = call.parse(response)
        if isinstance(result, WorkflowRun):
            keep = len(response.body) <= MAX_BODY_KEPT
            self._last_run = (call.path, response.body, result) if keep else None
        return result

    async def _connect(self, refused: DifyConnection | None = None) -> None:
        """Read the connection, and take a share of the session that goes with it."""
        connection = await read_connection(self.dify_conn_id, refused=refused)
        if self._session is None or connection != self.connection:
            await self.close()
            self._session = SharedSession.join(connection)
            self.connection = connection
            await self._session.open()

    async def _send(self, call: Call[Any]) -> HttpResponse:
        assert self._session is not None  # noqa: S101
        return await self._session.send(call.method, call.path, call.subject, params=call.params, body=call.body)
