"""The paths of Dify's API, below the base URL, and the ids that go into them."""

from __future__ import annotations

import uuid

from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.excerpts import one_line

INFO = "/info"
PARAMETERS = "/parameters"
LOGS = "/workflows/logs"
UPLOAD = "/files/upload"

# The longest user that Dify takes; a longer one is a 500.
MAX_USER_LENGTH = 255


def run_path(workflow_run_id: str) -> str:
    """Return the path of a run's detail."""
    return f"/workflows/run/{workflow_run_id}"


def start_path(workflow_id: str | None) -> str:
    """Return the path that starts a run of the current version, or of the one with this id."""
    return "/workflows/run" if workflow_id is None else f"/workflows/{parse_uuid('workflow_id', workflow_id)}/run"


def stop_path(task_id: str) -> str:
    """Return the path that stops a task."""
    return f"/workflows/tasks/{parse_uuid('task_id', task_id)}/stop"


def events_path(workflow_run_id: str) -> str:
    """Return the path of a run's events (Dify 1.14 and later)."""
    return f"/workflow/{workflow_run_id}/events"


def parse_workflow_run_id(workflow_run_id: object) -> str:
    """
    Parse a workflow run id before any request is made with it.

    Dify returns a 500 for an id that is no UUID, and an HTML 404 for an empty one, which both look like a fault of the
    server that may pass.

    :param workflow_run_id: any spelling that ``uuid.UUID`` takes.
    :return: the id in lower case with hyphens.
    :raises DifyConfigurationError: if it is anything else; the message shows what it was.
    """
    return parse_uuid("workflow_run_id", workflow_run_id)


def parse_uuid(name: str, value: object) -> str:
    """
    Parse an id that becomes part of a path.

    :param name: the argument, for the message.
    :param value: any spelling that ``uuid.UUID`` takes.
    :return: the id in lower case with hyphens.
    :raises DifyConfigurationError: if it is anything else; the message shows what it was.
    """
    if isinstance(value, uuid.UUID):
        return str(value)
    if isinstance(value, str):
        try:
            return str(uuid.UUID(value))
        except ValueError:
            pass
    raise DifyConfigurationError(
        f"{name} must be the UUID that Dify returned, but it is {one_line(repr(value), 120)} ({type(value).__name__}). "
        "If it is a template or comes from an upstream task, check what that task returned."
    )


def check_user(user: object) -> None:
    """
    Check the ``user`` of a request.

    :param user: text of 1 to 255 characters.
    :raises DifyConfigurationError: if it is anything else.
    """
    if not isinstance(user, str) or not user or len(user) > MAX_USER_LENGTH:
        raise DifyConfigurationError(
            f"user must be text of 1 to {MAX_USER_LENGTH} characters, but it is {one_line(repr(user), 300)}."
        )
