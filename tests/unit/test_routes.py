"""The ids that go into Dify's paths: what is none is refused, with the name that the caller knows."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify.api.calls import check_user, parse_workflow_run_id, start_path, stop_path
from airflow_provider_dify.exceptions import DifyConfigurationError


@pytest.mark.parametrize(
    ("path", "name"),
    [(start_path, "workflow_id"), (stop_path, "task_id"), (parse_workflow_run_id, "workflow_run_id")],
)
def test_what_is_no_id_is_refused_with_its_name_its_value_and_its_type(path: Callable[[Any], str], name: str) -> None:
    with pytest.raises(
        DifyConfigurationError, match=rf"^{name} must be the UUID that Dify returned, but it is 5 \(int\)"
    ):
        path(5)


@pytest.mark.parametrize("user", ["", "u" * 256, 5, None])
def test_a_user_that_dify_would_refuse_is_refused_before_the_request(user: object) -> None:
    with pytest.raises(DifyConfigurationError, match="user must be text of 1 to 255 characters, but it is ") as caught:
        check_user(user)
    assert repr(user)[:200] in str(caught.value)


def test_the_longest_user_is_taken() -> None:
    check_user("u" * 255)


def test_an_id_goes_into_its_path_in_lower_case() -> None:
    upper = "2D7A7544-770C-496F-8EF9-4E622682B330"
    assert start_path(upper) == f"/workflows/{upper.lower()}/run"
    assert stop_path(upper) == f"/workflows/tasks/{upper.lower()}/stop"


def test_an_id_may_be_a_uuid() -> None:
    run_id = uuid.uuid4()
    assert parse_workflow_run_id(run_id) == str(run_id)
