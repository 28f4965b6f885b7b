# SPDX-License-Identifier: Apache-2.0
"""A started run and its events for code that is not asynchronous: the engine's stream, on an event loop of its own."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import WorkflowEvent
from airflow_provider_dify.api.run_stream import NO_EXTRAS, AsyncWorkflowRunStream, StartExtras
from airflow_provider_dify.exceptions import DifyConfigurationError

if TYPE_CHECKING:
    from types import TracebackType

T = TypeVar("T")


class WorkflowRunStream:
    """
    A run that was started, and its events. The run continues without its client.

    ``with`` hangs up at its end, and ``for`` iterates over the events.

    :param connection: the connection's settings.
    :param seconds: how long to wait until Dify names the run.
    :param inputs: the workflow's inputs.
    :param user: who starts the run.
    :param workflow_id: UUID of a published version; ``None`` for the current one.
    :param extras: what goes along with the start.
    :raises DifyError: as :meth:`~airflow_provider_dify.hooks.dify.DifyHook.start_workflow_run` does.
    """

    def __init__(
        self,
        connection: DifyConnection,
        seconds: float,
        inputs: Mapping[str, Any],
        user: str,
        workflow_id: str | None,
        extras: StartExtras = NO_EXTRAS,
    ) -> None:
        async def read_connection(refused: DifyConnection | None) -> DifyConnection:
            return connection

        self._loop = asyncio.new_event_loop()
        self._is_closed = False
        self._closing = threading.Lock()
        self._client = DifyClient(read_connection)
        self._stream: AsyncWorkflowRunStream | None = None
        threading.Thread(target=self._run_loop, name="dify-run", daemon=True).start()
        try:
            self._call(self._start(seconds, inputs, user, workflow_id, extras))
        except BaseException:
            self.close()
            raise

    @property
    def workflow_run_id(self) -> str:
        """The run's UUID."""
        return self._started.workflow_run_id

    @property
    def task_id(self) -> str:
        """The UUID that :meth:`DifyHook.stop_workflow_task` takes."""
        return self._started.task_id

    @property
    def app_id(self) -> str | None:
        """The UUID of the run's app; ``None`` where the server doesn't say."""
        return self._started.app_id

    @property
    def server_version(self) -> str | None:
        """Dify's version; ``None`` where it doesn't say."""
        return self._started.server_version

    def next_event(self, seconds: float) -> WorkflowEvent | None:
        """
        Return the run's next event.

        :param seconds: how long to wait for it.
        :return: the event; ``None`` if there was none, which says nothing about the run.
        :raises DifyConnectionError: if the stream broke off; the run continues.
        """
        return self._call(self._started.next_event(seconds))

    def __iter__(self) -> Iterator[WorkflowEvent]:
        """
        Iterate over the events after ``workflow_started``, up to the one that ends the stream.

        :raises DifyConnectionError: if the stream breaks off, or is silent for longer than the timeout.
        """
        while True:
            event = self._call(self._started.next_required_event())
            yield event
            if event.is_ending:
                return

    def __enter__(self) -> WorkflowRunStream:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; the run continues. It may be called again."""
        with self._closing:
            was_closed, self._is_closed = self._is_closed, True
        if not was_closed:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)

    @property
    def _started(self) -> AsyncWorkflowRunStream:
        assert self._stream is not None  # noqa: S101
        return self._stream

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._loop.close()

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._is_closed:
            work.close()
            raise DifyConfigurationError(
                "The events of this workflow run cannot be read any more: the stream was closed."
            )
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _start(self, seconds: float, *start: Any) -> None:
        await self._client.__aenter__()
        self._stream = self._client.send_start(*start)
        await self._stream.require_name(seconds)

    async def _close(self) -> None:
        if self._stream is not None:
            self._stream.close()
        await self._client.__aexit__(None, None, None)
