# SPDX-License-Identifier: Apache-2.0
"""What :mod:`airflow_provider_dify.hooks.dify` does, awaited, for the triggerer's event loop."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from weakref import WeakKeyDictionary

from airflow.providers.common.compat.connection import get_async_connection

from airflow_provider_dify.airflow_versions import mask_secrets_async
from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.api.client import DifyClient, Shared
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.models import LoggedWorkflowRun, WorkflowRun, runs_of
from airflow_provider_dify.api.run_stream import start_extras
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.runs.starting import Starter
from airflow_provider_dify.runs.uploads import upload_inputs
from airflow_provider_dify.runs.waiting import NOT_FOUND_GRACE, WEEK_SECONDS, Deadline, WaitArguments

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime

    from airflow_provider_dify.api.run_stream import AsyncWorkflowRunStream


T = TypeVar("T")

_log: Any = logging.getLogger(__name__)


class DifyAsyncHook(DifyClient):
    """
    Talk to Dify on an event loop, with one app's API key. Never blocks the loop, never retries by itself.

    To be used as ``async with DifyAsyncHook() as hook: ...``, which takes and returns its share of the session.

    :param dify_conn_id: the Airflow connection, as for :class:`~airflow_provider_dify.hooks.dify.DifyHook`.
    :ivar connection: the connection's settings, as last read; ``None`` until then.
    :ivar server_version: Dify's version, as its last response named it; ``None`` until then.
    """

    def __init__(self, dify_conn_id: str = "dify_default") -> None:
        super().__init__(partial(_read_connection, dify_conn_id))
        self.dify_conn_id = dify_conn_id

    async def get_workflow_run(self, workflow_run_id: str) -> WorkflowRun:
        """
        Look a workflow run up: ``GET /workflows/run/{workflow_run_id}``. One request, or two if the key was rotated.

        :param workflow_run_id: the run's UUID, in any spelling that ``uuid.UUID`` takes.
        :return: the run, whatever its status.
        :raises DifyError: as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.get_workflow_run` does.
        """
        return await self.perform(calls.run_detail(calls.parse_workflow_run_id(workflow_run_id)))

    async def start_workflow_run(
        self,
        inputs: Mapping[str, Any],
        user: str,
        *,
        workflow_id: str | None = None,
        timeout: float = 300.0,
        trace_id: str | None = None,
        trace_session_id: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> AsyncWorkflowRunStream:
        """
        Start a run, and wait until Dify names it; sent once, and once more if the key was rotated.

        :param inputs: as for :meth:`~airflow_provider_dify.hooks.dify.DifyHook.start_workflow_run`.
        :param user: as there.
        :param workflow_id: as there.
        :param timeout: as there.
        :param trace_id: as there.
        :param trace_session_id: as there.
        :param extra_body: as there.
        :return: the started run: its ids, and its events. To be closed, by ``async with``.
        :raises DifyError: as there; a :class:`DifyConnectionError` if nothing was started.
        """
        until, extras = time.time() + timeout, start_extras(trace_id, trace_session_id, extra_body)
        inputs = await upload_inputs(self, inputs, user, workflow_id, deadline=Deadline.after(timeout, "hook's"))

        async def start() -> AsyncWorkflowRunStream:
            stream = self.send_start(inputs, user, workflow_id, extras)
            await stream.require_name(max(min(timeout, 1.0), round(until - time.time(), 1)))
            self.server_version = stream.server_version or self.server_version
            return stream

        return await self.with_current_key(start)

    async def run_workflow(
        self,
        inputs: Mapping[str, Any],
        user: str,
        *,
        workflow_id: str | None = None,
        poll_interval: float = 10.0,
        timeout: float = WEEK_SECONDS,
        trace_id: str | None = None,
        trace_session_id: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
    ) -> WorkflowRun:
        """
        Start a run and wait until it is over, as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.run_workflow`.

        :param inputs: as there.
        :param user: as there.
        :param workflow_id: as there.
        :param poll_interval: as there.
        :param timeout: as there.
        :param trace_id: as there.
        :param trace_session_id: as there.
        :param extra_body: as there.
        :return: the run, whatever its status.
        :raises DifyError: as there.
        """
        deadline, extras = Deadline.after(timeout, "hook's"), start_extras(trace_id, trace_session_id, extra_body)
        arguments = WaitArguments(poll_interval=poll_interval, not_found_grace=NOT_FOUND_GRACE)
        # One of its own, for its deadline; the session is shared.
        async with DifyClient(self._read_connection) as client:
            client.deadline = deadline.at
            return await Starter(client, deadline, _log, arguments).run(inputs, user, workflow_id, extras)

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


# Seconds for which a reading counts.
FRESH_SECONDS = 60.0


@dataclass(frozen=True)
class _Reading(Generic[T]):
    task: asyncio.Task[T]
    began: float = field(default_factory=time.monotonic)

    def is_fresh(self, seconds: float) -> bool:
        """Return whether it is under way, or has brought something not long ago."""
        if not self.task.done():
            return True
        failed = self.task.cancelled() or self.task.exception() is not None
        return not failed and time.monotonic() - self.began < seconds


async def _read_connection(conn_id: str, refused: DifyConnection | None) -> DifyConnection:
    """
    Return a connection's settings, which are read once a minute at most for all who use this event loop.

    A trigger reads its connection over the triggerer's parent process and Airflow's API. When a triggerer starts again
    with a thousand waits, a thousand readings would stand in line before the first poll of each. Dify has just refused
    the key of ``refused``: what was read before now and is the same doesn't count.
    """
    readings = _readings.setdefault(asyncio.get_running_loop(), {})
    now = time.monotonic()
    while True:
        reading = readings.get(conn_id)
        if reading is None or not reading.is_fresh(FRESH_SECONDS):
            reading = readings[conn_id] = _begin(conn_id)
        # Shielded, because a trigger that is cancelled must not end what others wait for.
        connection = await asyncio.shield(reading.task)
        if connection != refused or reading.began >= now:
            return connection
        if readings.get(conn_id) is reading:
            # The first of many whose key was refused; the others wait for the same new reading.
            readings[conn_id] = _begin(conn_id)


def _begin(conn_id: str) -> _Reading[DifyConnection]:
    task = asyncio.create_task(_read(conn_id))
    task.add_done_callback(_retrieve)
    return _Reading(task)


async def _read(conn_id: str) -> DifyConnection:
    connection = DifyConnection.from_airflow(await get_async_connection(conn_id))
    await mask_secrets_async(connection.secret_headers)
    return connection


def _retrieve(task: asyncio.Task[DifyConnection]) -> None:
    """Take note of an error that nobody waits for any more, so that asyncio does not log it."""
    if not task.cancelled():
        task.exception()


_readings: WeakKeyDictionary[asyncio.AbstractEventLoop, dict[str, _Reading[DifyConnection]]] = WeakKeyDictionary()


# Seconds for which a response is shared; far below the time between two looks.
SHARED_SECONDS = 1.0
# Seconds after which the connection is read again: a watcher never ends, and a connection may be given another host.
CONNECTION_SECONDS = 600.0


class SharedReading(Shared):
    """What reads one app's log for all who watch it, one request after another. It is opened at the first request."""

    def __init__(self, dify_conn_id: str) -> None:
        self.dify_conn_id = dify_conn_id
        self._hook: DifyAsyncHook | None = None
        self._opened_at = 0.0
        self._lock = asyncio.Lock()
        self._responses: dict[tuple[Any, ...], _Reading[Any]] = {}

    async def perform(self, call: Call[T]) -> T:
        """Send a request, unless another watcher has sent it at this moment, and return what its response means."""
        self._responses = {key: known for key, known in self._responses.items() if known.is_fresh(SHARED_SECONDS)}
        key = (call.method, call.path, *sorted((call.params or {}).items()))
        if key not in self._responses:
            self._responses[key] = _Reading(asyncio.create_task(self._send(call)))
        # Shielded, because a watcher that ends must not end what others wait for.
        result: T = await asyncio.shield(self._responses[key].task)
        return result

    async def _send(self, call: Call[T]) -> T:
        async with self._lock:
            if self._hook is None or time.monotonic() - self._opened_at > CONNECTION_SECONDS:
                await self._hang_up()
                self._hook = await DifyAsyncHook(self.dify_conn_id).__aenter__()
                self._opened_at = time.monotonic()
            try:
                return await self._hook.perform(call)
            except DifyConnectionError:
                # Dify may have moved.
                self._opened_at = -math.inf
                raise

    async def _close(self) -> None:
        tasks = [known.task for known in self._responses.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._hang_up()

    async def _hang_up(self) -> None:
        hook, self._hook = self._hook, None
        if hook is not None:
            await hook.close()
