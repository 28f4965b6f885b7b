"""The ``task_id`` of a run that was found in Dify's log: only its next events carry it (Dify 1.14 and later)."""

from __future__ import annotations

import contextlib
import time

from airflow_provider_dify.api.calls import LiveTaskId, events_path
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.events import EventStreamReader
from airflow_provider_dify.api.session import DifySession, call_within


def task_id_from(reader: EventStreamReader, piece: bytes, workflow_run_id: str) -> str | None:
    """
    Return the task's id out of the next piece of a run's events.

    :param reader: the reader of the stream.
    :param piece: the next bytes.
    :param workflow_run_id: the run; in events of the past, Dify puts its id in place of the task's (measured).
    :return: the id; ``None`` if the piece has none.
    """
    ids = (event.task_id for event in reader.feed(piece))
    return next((task_id for task_id in ids if task_id and task_id != workflow_run_id), None)


def read_live_task_id(session: DifySession, connection: DifyConnection, step: LiveTaskId) -> str | None:
    """
    Wait for a run's next event, and return the task's id.

    :param session: the session, made for the connection.
    :param connection: the connection's settings.
    :param step: the run, its user, and how many seconds to wait.
    :return: the id; ``None`` if no event came in time, or the server has no such route.
    """
    until = time.monotonic() + step.seconds

    def read() -> str | None:
        reader = EventStreamReader()
        url = f"{connection.base_url}{events_path(step.workflow_run_id)}"
        with session.get(url, params={"user": step.user}, stream=True, allow_redirects=False) as response:
            while response.ok and time.monotonic() < until and (piece := response.raw.read1(65536)):
                if task_id := task_id_from(reader, piece, step.workflow_run_id):
                    return task_id
        return None

    # Whatever goes wrong, the task's id stays unknown, and that is all.
    with contextlib.suppress(Exception):
        return call_within(step.seconds, read, session.abort)
    return None
