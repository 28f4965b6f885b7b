"""What is asked of Dify: the requests, as they go out and as errors name them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call
from airflow_provider_dify.exceptions import DifyConnectionError, DifyWorkflowRunNotFound

RUN_ID = "e9d68a02-335c-48ff-bcca-2aa6ff006579"
MOMENT = datetime(2026, 11, 21, 22, 20, tzinfo=timezone.utc)
FILTERS = {"user": "me", "status": "failed", "created_after": MOMENT, "page": 3, "limit": 5}


@pytest.mark.parametrize(
    ("make", "method", "path", "subject", "params", "body"),
    [
        (lambda: calls.run_detail(RUN_ID), "GET", f"/workflows/run/{RUN_ID}", f"workflow run {RUN_ID}", None, None),
        (calls.app_info, "GET", "/info", "the app's name", None, None),
        (calls.parameters, "GET", "/parameters", "the app's input form", None, None),
        (
            lambda: calls.stop_task(RUN_ID, "me"), "POST", f"/workflows/tasks/{RUN_ID}/stop",
            f"the stop of task {RUN_ID}", None, {"user": "me"},
        ),
        (
            calls.logged_runs, "GET", "/workflows/logs", "the app's log of workflow runs",
            {"page": 1, "limit": 20}, None,
        ),
        (
            lambda: calls.logged_runs(**FILTERS), "GET", "/workflows/logs", "the app's log of workflow runs",
            {
                "created_by_end_user_session_id": "me",
                "status": "failed",
                "created_at__after": "2026-11-21T22:20:00+00:00",
                "page": 3,
                "limit": 5,
            },
            None,
        ),
    ],
)  # fmt: skip
def test_a_request_says_what_is_asked_for(
    make: Callable[[], Call[Any]], method: str, path: str, subject: str, params: Any, body: Any
) -> None:
    call = make()
    assert (call.method, call.path, call.subject, call.params, call.body) == (method, path, subject, params, body)


def failed_look_up(**fields: Any) -> Any:
    """Look a run up whose request fails so, while the app's name can be read; return the error."""
    steps = calls.look_up_run(RUN_ID)
    next(steps)
    error = DifyConnectionError(
        "failed", **{"status_code": 500, "code": "unknown", "server_version": "1.13.0", **fields}
    )
    try:
        steps.throw(error)
        steps.send(None)
    except (DifyConnectionError, DifyWorkflowRunNotFound) as failure:
        return failure
    raise AssertionError("the look-up failed without an error")


@pytest.mark.parametrize(("message", "start"), [("broken", "broken"), (None, "Internal Server Error")])
def test_a_1_13_0_that_fails_for_one_run_only_may_not_know_it(message: str | None, start: str) -> None:
    error = failed_look_up(dify_message=message)
    assert type(error) is DifyWorkflowRunNotFound
    assert (error.workflow_run_id, error.is_sure) == (RUN_ID, False)
    assert str(error).startswith(f"{start} (HTTP 500): Dify 1.13.0 responds so for a run that it does not know, and ")
    assert f"it does not know workflow run {RUN_ID}, or" in str(error)


@pytest.mark.parametrize(
    "fields",
    [{"status_code": 502}, {"code": "internal_server_error"}, {"server_version": "1.13.1"}, {"server_version": None}],
)
def test_any_other_failure_of_a_look_up_is_one_of_the_server(fields: dict[str, Any]) -> None:
    assert str(failed_look_up(**fields)) == "failed"


@pytest.mark.parametrize(("version", "is_final"), [("1.13.0", True), ("1.12.1", False)])
def test_what_may_mean_an_unknown_run_is_not_asked_again(version: str, is_final: bool) -> None:
    error = DifyConnectionError("failed", status_code=500, code="unknown", server_version=version)
    assert calls.run_detail(RUN_ID).is_final(error) is is_final
    assert calls.app_info().is_final(error) is False
