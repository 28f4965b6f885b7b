"""What is asked of Dify: the requests, as they go out and as errors name them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call

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
