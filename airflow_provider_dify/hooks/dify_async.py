"""What :mod:`airflow_provider_dify.hooks.dify` does, awaited, for the triggerer's event loop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakSet

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.async_run_stream import AsyncWorkflowRunStream
from airflow_provider_dify.api.async_session import SharedSession
from airflow_provider_dify.api.calls import (
    Call,
    LiveTaskId,
    Pause,
    SendStart,
    Step,
    Steps,
    encode_start,
    run_steps_async,
)
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.http_response import HttpResponse, no_response
from airflow_provider_dify.api.models import LoggedWorkflowRun, WorkflowRun, runs_of
from airflow_provider_dify.api.started_run import NextEvent
from airflow_provider_dify.exceptions import DifyAuthenticationError
from airflow_provider_dify.hooks.shared_connection import read_connection
from airflow_provider_dify.runs.clock import WEEK, TaskClock
from airflow_provider_dify.runs.following import Follower
from airflow_provider_dify.runs.whole_run import run_workflow

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import datetime
    from types import TracebackType

T = TypeVar("T")

_log: Any = logging.getLogger(__name__)

# A run's inputs may be megabytes, and a triggerer has many waits.
MAX_BODY_KEPT = 32_768


class DifyAsyncHook:
    """
    Talk to Dify on an event loop, with one app's API key. Never blocks the loop, never retries by itself.

    To be used as ``async with DifyAsyncHook() as hook: ...``, which takes and returns its share of the session.

    :param dify_conn_id: the Airflow connection, as for :class:`~airflow_provider_dify.hooks.dify.DifyHook`.
    :param keeps_connections: whether starts share connections, for many starts one after another. A start that breaks
        off when the server closes its connection may have arrived then: :class:`DifyWorkflowRunUncertain`.
    :ivar connection: the connection's settings, as last read; ``None`` until then.
    :ivar server_version: Dify's version, as its last response named it; ``None`` until then.
    """

    def __init__(self, dify_conn_id: str = "dify_default", *, keeps_connections: bool = False) -> None:
        self.dify_conn_id = dify_conn_id
        self._keeps_connections = keeps_connections
        self.connection: DifyConnection | None = None
        self.server_version: str | None = None
        self._session: SharedSession | None = None
        self._streams: WeakSet[AsyncWorkflowRunStream] = WeakSet()
        self._last_run: tuple[str, bytes, WorkflowRun] | None = None
        self._reading = asyncio.Lock()

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
        try:
            # The end of the event loop, which may come next, waits for no socket.
            await asyncio.gather(*(stream.wait_closed() for stream in self._streams))
        finally:
            await self.close()

    async def close(self) -> None:
        """Return the share of the session; the last one out closes it."""
        session, self._session = self._session, None
        if session is not None:
            await session.leave()

    @property
    def response_timeout(self) -> float:
        """Seconds for a whole response."""
        assert self.connection is not None  # noqa: S101
        return self.connection.timeouts()[1]

    async def get_workflow_run(self, workflow_run_id: str) -> WorkflowRun:
        """
        Look a workflow run up: ``GET /workflows/run/{workflow_run_id}``. One request, or two if the key was rotated.

        :param workflow_run_id: the run's UUID, in any spelling that ``uuid.UUID`` takes.
        :return: the run, whatever its status.
        :raises DifyError: as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run` does.
        """
        return await self.run_steps(calls.look_up_run(calls.parse_workflow_run_id(workflow_run_id)))

    async def start_workflow_run(
        self, inputs: Mapping[str, Any], user: str, *, workflow_id: str | None = None, timeout: float = 300.0
    ) -> AsyncWorkflowRunStream:
        """
        Start a run, and wait until Dify names it; sent once, and once more if the key was rotated.

        :param inputs: as for :meth:`~airflow_provider_dify.hooks.dify.DifyHook.start_workflow_run`.
        :param user: as there.
        :param workflow_id: as there.
        :param timeout: as there.
        :return: the started run: its ids, and its events. To be closed, by ``async with``.
        :raises DifyError: as there; a :class:`DifyConnectionError` if nothing was started.
        """
        until = time.time() + timeout

        async def start() -> AsyncWorkflowRunStream:
            stream = self._send_start(SendStart(inputs, user, workflow_id))
            await stream.require_name(max(min(timeout, 1.0), round(until - time.time(), 1)))
            self.server_version = stream.server_version or self.server_version
            return stream

        return await self._with_current_key(start)

    async def run_workflow(
        self,
        inputs: Mapping[str, Any],
        user: str,
        *,
        workflow_id: str | None = None,
        poll_interval: float = 10.0,
        timeout: float = WEEK,
    ) -> WorkflowRun:
        """
        Start a run and wait until it is over, as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.run_workflow`.

        :param inputs: as there.
        :param user: as there.
        :param workflow_id: as there.
        :param poll_interval: as there.
        :param timeout: as there.
        :return: the run, whatever its status.
        :raises DifyError: as there.
        """
        follower = Follower(self, TaskClock(time.time() + timeout, math.inf), _log, poll_interval, "hook's")
        take_step = partial(self._take_step_until, follower.clock)
        return await run_steps_async(run_workflow(follower, inputs, user, workflow_id, timeout), take_step)

    async def list_workflow_runs(
        self, *, user: str | None = None, created_after: datetime | None = None, page: int = 1, limit: int = 20
    ) -> list[LoggedWorkflowRun]:
        """
        List the app's workflow runs, as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.list_workflow_runs`.

        :raises DifyError: as there.
        """
        rows = await self.perform(calls.logged_runs(user=user, created_after=created_after, page=page, limit=limit))
        return runs_of(rows)

    async def stop_workflow_task(self, task_id: str, user: str) -> None:
        """
        Ask Dify to stop a running workflow, as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.stop_workflow_task`.

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

        async def send() -> T:
            return self._parse(call, await self._send(call))

        return await self._with_current_key(send)

    async def run_steps(self, steps: Steps[T]) -> T:
        """
        Run requests that depend on each other, as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.run_steps`.

        :param steps: yields each request, and is sent what its response meant.
        :return: what the steps return.
        """
        return await run_steps_async(steps, self.take_step)

    async def take_step(self, step: Step) -> Any:
        """
        Take one of :meth:`run_steps`.

        :param step: what is to be done.
        :return: what its response means.
        """
        if isinstance(step, Pause):
            return await asyncio.sleep(step.seconds)
        if isinstance(step, NextEvent):
            return await step.stream.next_event(step.seconds)
        if isinstance(step, SendStart):
            return self._send_start(step)
        if isinstance(step, LiveTaskId):
            with contextlib.suppress(Exception):
                assert self._session is not None  # noqa: S101
                return await asyncio.wait_for(self._session.read_live_task_id(step), step.seconds)
            return None
        return await self.perform(step)

    async def _take_step_until(self, clock: TaskClock, step: Step) -> Any:
        """Take a step of a wait; a request ends with the wait, but has a second, as on a worker."""
        if not isinstance(step, Call):
            return await self.take_step(step)
        assert self.connection is not None  # noqa: S101
        seconds = max(1.0, clock.left)
        try:
            return await asyncio.wait_for(self.take_step(step), seconds)
        except asyncio.TimeoutError:
            error = TimeoutError(f"no whole response within {seconds:.3g} seconds")
            raise no_response(self.connection, step.subject, f"{self.connection.base_url}{step.path}", error) from None

    async def _with_current_key(self, work: Callable[[], Awaitable[T]]) -> T:
        used = self.connection
        try:
            return await work()
        except DifyAuthenticationError:
            if not await self.connection_has_changed(used):
                raise
            return await work()

    async def connection_has_changed(self, refused: DifyConnection | None) -> bool:
        """
        Read the connection again, after its key was refused: a key that was rotated must not end a long wait.

        :param refused: the connection in use then.
        :return: whether there is another one now.
        """
        async with self._reading:
            if self.connection == refused:
                await self._connect(refused)
        return self.connection != refused

    def _send_start(self, start: SendStart) -> AsyncWorkflowRunStream:
        """Send a start once, and return at once."""
        path = calls.start_path(start.workflow_id)
        body = encode_start(start.inputs, start.user)
        assert self.connection is not None  # noqa: S101
        url = f"{self.connection.base_url}{path}"
        stream = AsyncWorkflowRunStream(
            self.connection, url, body, start.user, keeps_connection=self._keeps_connections
        )
        self._streams.add(stream)
        return stream

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
        connection.check_key()
        if self._session is None or connection != self.connection:
            await self.close()
            self._session = SharedSession.join(connection)
            self.connection = connection
            await self._session.open()

    async def _send(self, call: Call[Any]) -> HttpResponse:
        assert self._session is not None  # noqa: S101
        return await self._session.send(
            call.method, call.path, call.subject, params=call.params, body=call.body, patience=call.patience
        )
