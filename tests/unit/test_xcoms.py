"""Which outputs can be XComs, which XComs a run has, and that the link leads to the web and nowhere else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import XCOMS_ARE_STRICT_JSON
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.models import WorkflowRun, WorkflowRunStatus
from airflow_provider_dify.exceptions import DifyOutputsError
from airflow_provider_dify.links.dify import DifyWorkflowRunLink
from airflow_provider_dify.tasks.xcoms import RESERVED, check_outputs, run_log_url, xcom_problem, xcoms_from_run

RUN = WorkflowRun(
    id="2d7a7544-770c-496f-8ef9-4e622682b330",
    workflow_id=None,
    status=WorkflowRunStatus.SUCCEEDED,
    inputs={},
    outputs={},
    error=None,
    total_steps=2,
    total_tokens=0,
    created_at=None,
    finished_at=None,
    elapsed_time=0.5,
)
# What Airflow 3 can't store. Airflow 2 stores it.
NOT_JSON = [
    (float("nan"), "the number nan"),
    (float("-inf"), "the number -inf"),
    (2**70, "more than 64 bits"),
    (2**64, "more than 64 bits"),
    (-(2**63) - 1, "more than 64 bits"),
    ("a\0b", "NUL"),
    ("\ud83d", "surrogate"),
    ({"a\0": 1}, "NUL"),
    ([{"\udfff": 1}], "surrogate"),
]


def with_outputs(outputs: dict[str, Any]) -> WorkflowRun:
    return dataclasses.replace(RUN, outputs=outputs)


def nested(depth: int) -> Any:
    value: Any = 1
    for number in range(depth):
        value = [value] if number % 2 else {"a": value}
    return value


@pytest.mark.skipif(not XCOMS_ARE_STRICT_JSON, reason="Airflow 2 stores them.")
@pytest.mark.parametrize(("value", "reason"), NOT_JSON)
def test_an_output_that_airflow_cannot_store_is_named_with_the_reason(value: Any, reason: str) -> None:
    check_outputs(with_outputs({"good": 1}))
    with pytest.raises(DifyOutputsError, match=rf"The output 'bad' holds .*{reason}.*succeeded") as caught:
        check_outputs(with_outputs({"good": 1, "bad": {"deep": [value]}}))
    assert str(caught.value).isprintable()


@pytest.mark.skipif(XCOMS_ARE_STRICT_JSON, reason="Airflow 3 can't store them.")
@pytest.mark.parametrize("value", [value for value, _ in NOT_JSON])
def test_airflow_2_stores_what_its_successor_does_not(value: Any) -> None:
    check_outputs(with_outputs({"good": value}))


@pytest.mark.skipif(not XCOMS_ARE_STRICT_JSON, reason="Airflow 2 stores them.")
@pytest.mark.parametrize("name", ["a\0", "\ud800"])
def test_an_output_whose_name_airflow_cannot_store_is_named_too(name: str) -> None:
    with pytest.raises(DifyOutputsError) as caught:
        check_outputs(with_outputs({name: 1}))
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "outputs",
    [
        {"bad": {"__classname__": "builtins.tuple", "__version__": 1, "__data__": []}},
        {"bad": [{"__id__": 1}]},
        {"bad": {"__type": "airflow.models.connection.Connection", "__var": {}}},
        {"__classname__": "x"},
        {"__id__": 1},
        {"__type": "x", "__var": 1},
    ],
)
def test_an_output_that_airflow_would_take_for_an_object_of_its_own_is_refused(outputs: dict[str, Any]) -> None:
    with pytest.raises(DifyOutputsError, match="serialized objects of Airflow"):
        check_outputs(with_outputs({"good": 1, **outputs}))


def test_half_of_such_an_object_is_data() -> None:
    check_outputs(with_outputs({"__type": 1, "graphql": {"__type": "Query"}, "x": {"__var": 1}}))


@pytest.mark.parametrize("depth", [101, 1000, 100_000])
def test_an_output_that_is_nested_too_deeply_is_named(depth: int) -> None:
    check_outputs(with_outputs({"good": nested(99)}))
    with pytest.raises(DifyOutputsError, match=r"'bad' is nested more than 100 levels deep"):
        check_outputs(with_outputs({"bad": nested(depth)}))


@pytest.mark.parametrize("value", [2**64 - 1, -(2**63), 1e308, "", "二🎉\n\t", None, True, [], {}, {"": 1}])
def test_any_other_json_can_be_an_xcom(value: Any) -> None:
    assert xcom_problem(value) is None
    check_outputs(with_outputs({"": value, "x": [value]}))


def test_an_output_with_the_name_of_an_xcom_of_ours_is_in_the_return_value_only() -> None:
    outputs = dict.fromkeys(RESERVED, "javascript:alert(1)") | {"": 1, "answer": 2}
    xcoms = xcoms_from_run(with_outputs(outputs), multiple_outputs=True)
    assert xcoms.pop("return_value") == outputs
    assert xcoms.pop("workflow_run")["id"] == RUN.id
    assert xcoms == {"answer": 2}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"error": "a\0b\ud800"}, {"error": "a\\x00b\\ud800"}),
        ({"error": "line 1\nline 2 二"}, {"error": "line 1\nline 2 二"}),
        ({"status": "new\0"}, {"status": "new\\x00"}),
        ({"total_steps": 2**70, "total_tokens": 10**400}, {"total_steps": None, "total_tokens": None}),
    ],
)
def test_the_xcom_of_the_run_can_always_be_stored(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    run = dataclasses.replace(RUN, **fields)
    described = xcoms_from_run(run, multiple_outputs=False)["workflow_run"]
    assert xcom_problem(described) is None
    assert described == {**RUN.without_payload(), **expected}
    assert json.dumps(described, allow_nan=False)


# --- the link


class _Operator:
    """A task on a worker, where the link is known without asking Airflow."""

    def __init__(self, url: Any) -> None:
        self.run_log_url = url


@pytest.mark.parametrize(
    "url",
    ["javascript:alert(1)", " https://dify.example", "data:text/html,x", "//dify.example", "ftp://x", {"a": 1}, 5],
)
def test_a_link_that_leads_elsewhere_than_to_the_web_is_no_link(url: Any) -> None:
    assert DifyWorkflowRunLink().get_link(_Operator(url), ti_key=None) == ""


def test_the_link_leads_to_the_log_of_the_app_in_the_console() -> None:
    connection = DifyConnection("x", "https://api.dify.ai/v1", "key")
    url = run_log_url(connection, RUN.id)
    assert url == f"https://cloud.dify.ai/app/{RUN.id}/logs"
    assert DifyWorkflowRunLink().get_link(_Operator(url), ti_key=None) == url
