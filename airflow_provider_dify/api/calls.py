"""
What is asked of Dify, as data: one request, or several that depend on each other. No I/O.

A function that needs several requests is a generator of :data:`Steps`: it yields a :class:`Call` and is sent what the
response meant, or has the error thrown in. The hooks run it, one with ``await`` and one without.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Generic, TypeVar

from airflow_provider_dify.api import responses, routes
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.started_run import NextEvent
from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyWorkflowRunNotFound
from airflow_provider_dify.models import AppInfo, LogRow, WorkflowRun

T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """
    One request.

    :param method: HTTP method.
    :param path: path below the base URL.
    :param subject: what is requested, in the middle of a message.
    :param parse: returns what the whole response means, or raises.
    :param params: the query.
    :param body: a JSON body.
    :param is_final: whether an error that usually may pass is not worth another attempt.
    :param patience: seconds that the server gets for the response at least, whatever the connection says.
    """

    method: str
    path: str
    subject: str
    parse: Callable[[HttpResponse], T]
    params: Mapping[str, Any] | None = None
    body: Mapping[str, Any] | None = None
    is_final: Callable[[DifyConnectionError], bool] = field(default=lambda error: False)
    patience: float = 0.0


@dataclass(frozen=True)
class Pause:
    """A pause of so many seconds between two requests."""

    seconds: float


@dataclass(frozen=True)
class LiveTaskId:
    """The ``task_id`` of a running run, out of the next event that the run sends (Dify 1.14 and later)."""

    workflow_run_id: str
    user: str
    seconds: float


@dataclass(frozen=True)
class SendStart:
    """The start of a run, sent once; it returns the start's stream at once, whose response is still to come."""

    inputs: Mapping[str, Any]
    user: str
    workflow_id: str | None = None


Step = Call[Any] | Pause | LiveTaskId | SendStart | NextEvent
Steps = Generator[Step, Any, T]


def run_detail(workflow_run_id: str) -> Call[WorkflowRun]:
    """Return the request for a run's detail; the id is parsed already."""
    return Call(
        "GET",
        routes.run_path(workflow_run_id),
        f"workflow run {workflow_run_id}",
        lambda response: responses.parse_workflow_run(response, workflow_run_id),
        is_final=_may_mean_an_unknown_run,
    )


def app_info() -> Call[AppInfo]:
    """Return the request for the app's name and mode."""
    return Call("GET", routes.INFO, "the app's name", responses.parse_app_info)


def parameters() -> Call[dict[str, Any]]:
    """Return the request for the app's input form."""
    return Call("GET", routes.PARAMETERS, "the app's input form", responses.parse_parameters)


def stop_task(task_id: str, user: str) -> Call[None]:
    """Return the request to stop a task."""
    routes.check_user(user)
    path = routes.stop_path(task_id)
    return Call("POST", path, f"the stop of task {task_id}", responses.parse_stop, body={"user": user})


def logged_runs(
    *,
    user: str | None = None,
    status: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    page: int = 1,
    limit: int = 20,
    patience: float = 0.0,
) -> Call[list[LogRow]]:
    """Return the request for a page of the app's log, newest runs first."""
    params = {
        "created_by_end_user_session_id": user,
        "status": status,
        "created_at__after": created_after.isoformat() if created_after else None,
        "created_at__before": created_before.isoformat() if created_before else None,
        "page": page,
        "limit": limit,
    }
    return Call(
        "GET",
        routes.LOGS,
        responses.LOG_SUBJECT,
        responses.parse_log,
        params={name: value for name, value in params.items() if value is not None},
        patience=patience,
    )


def look_up_run(workflow_run_id: str) -> Steps[WorkflowRun]:
    """
    Look a run up, also where the server can't say that it doesn't know the run.

    Dify 1.13.0 returns the same 500 for an unknown run as for a fault (measured); 1.13.1 and later return a 404.

    :param workflow_run_id: the run's UUID, parsed already.
    :return: the run.
    :raises DifyWorkflowRunNotFound: also where only the requests for this run fail on a 1.13.0; not sure then.
    :raises DifyError: any other.
    """
    try:
        run: WorkflowRun = yield run_detail(workflow_run_id)
        return run
    except DifyConnectionError as error:
        if not _may_mean_an_unknown_run(error):
            raise
        try:
            yield app_info()
        except DifyError:
            raise error from None
        raise DifyWorkflowRunNotFound(
            f"{error.message or 'Internal Server Error'} (HTTP 500): Dify 1.13.0 responds so for a run that it "
            f"does not know, and it does not know workflow run {workflow_run_id}, or cannot read its record: other "
            "requests succeed. Check the id, and that the connection holds an API key of the app that made the run. "
            "Dify 1.13.1 and later name an unknown run as such. If the server writes runs late, set not_found_grace.",
            workflow_run_id=workflow_run_id,
            is_sure=False,
        ) from error


def _may_mean_an_unknown_run(error: DifyConnectionError) -> bool:
    return error.status_code == 500 and error.code == "unknown" and error.server_version == "1.13.0"
