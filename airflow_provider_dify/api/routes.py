"""The paths of Dify's API, below the base URL, and the ids that go into them."""

from __future__ import annotations

import uuid

from airflow_provider_dify.exceptions import DifyConfigurationError

# How much of a wrong id a message shows.
_EXCERPT_LENGTH = 120
# The longest user that Dify takes; a longer one is a 500.
MAX_USER_LENGTH = 255


def canonical_workflow_run_id(workflow_run_id: object) -> str:
    """
    Check a workflow run id before any request is made with it.

    Dify answers an id that is no UUID with a 500, and an empty one with an HTML 404, which both look like passing
    trouble of the server.

    :param workflow_run_id: any spelling that ``uuid.UUID`` takes.
    :return: the id in lower case with hyphens.
    :raises DifyConfigurationError: if it is anything else; the message shows what it was.
    """
    return canonical_uuid("workflow_run_id", workflow_run_id)


def canonical_uuid(name: str, value: object) -> str:
    """
    Check an id that becomes part of a route.

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
    shown = repr(value)
    if len(shown) > _EXCERPT_LENGTH:
        shown = shown[:_EXCERPT_LENGTH] + "…"
    raise DifyConfigurationError(
        f"{name} must be the UUID that Dify gave it, but it is {shown} ({type(value).__name__}). If it is a template "
        "or comes from an upstream task, check what that task returned."
    )


def workflow_run_subject(workflow_run_id: str) -> str:
    """Give the words for a run in the middle of a message."""
    return f"workflow run {workflow_run_id}"


def workflow_run_path(workflow_run_id: str) -> str:
    """Give the route of a run's detail, below the base URL."""
    return f"/workflows/run/{workflow_run_id}"


def stop_path(task_id: str) -> str:
    """Give the route that stops a task, below the base URL."""
    return f"/workflows/tasks/{canonical_uuid('task_id', task_id)}/stop"
