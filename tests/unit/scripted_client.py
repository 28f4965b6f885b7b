"""A client that sends nothing: it takes requests, and responds as a test says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from airflow_provider_dify.api.calls import Call


class ScriptedClient:
    """
    What a client is to the code that waits for runs.

    :param respond: gets each request, and returns what its response means; an exception that it returns is raised.
    :param server_version: Dify's version, known from the first response on.
    :param task_id: what a run's events say of its task.
    :ivar taken: the requests, in order.
    """

    def __init__(
        self, respond: Callable[[Call[Any]], Any], server_version: str | None = None, task_id: str | None = None
    ) -> None:
        self.server_version: str | None = None
        self.taken: list[Call[Any]] = []
        self.was_asked_for_task_id = False
        self._respond = respond
        self._server_version = server_version
        self._task_id = task_id

    async def perform(self, call: Call[Any]) -> Any:
        self.taken.append(call)
        response = self._respond(call)
        self.server_version = self._server_version
        if isinstance(response, Exception):
            raise response
        return response

    async def read_task_id(self, workflow_run_id: str, user: str, seconds: float) -> str | None:
        self.was_asked_for_task_id = True
        return self._task_id
