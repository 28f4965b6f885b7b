"""Outputs that Airflow can't store: one clear error without a retry, and everything else is there."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import XCOMS_ARE_STRICT_JSON
from airflow_provider_dify.exceptions import DifyOutputsError
from tests.airflow.airflow_processes import AIRFLOW_2, AIRFLOW_3_0
from tests.airflow.airflow_runs import OPERATOR_WAYS, DagRunResult, error_of, run_operator, run_sensor
from tests.combinations import pairs
from tests.dify_stand_in import DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


# What Airflow 3 can't store, and what neither can.
NOT_JSON = [float("nan"), 2**70, "a\0b", "\ud83d", {"\ud83d": 1}]
BAD = [
    {"__classname__": "x", "__version__": 1, "__data__": 1},
    {"__id__": 1},
    {"__type": "x", "__var": 1},
    nested(300),
    *(NOT_JSON if XCOMS_ARE_STRICT_JSON else []),
]
GOOD = [
    2**64 - 1,
    -(2**63),
    1e308,
    {"": 1},
    {"__type": 1},
    nested(90),
    *([] if XCOMS_ARE_STRICT_JSON else NOT_JSON[:2]),
]


def run_with(dify: DifyStandIn, outputs: dict[str, Any], kind: str, **arguments: Any) -> DagRunResult:
    if kind == "sensor":
        run_id = dify.add_run("succeeded", outputs=outputs)
        return run_sensor(workflow_run_id=run_id, retries=1, retry_delay=0, **arguments)
    dify.starts.append(Start(statuses=("succeeded",), fields={"outputs": outputs}))
    return run_operator(retries=1, retry_delay=0, **arguments)


KINDS = {"operator": "run", "sensor": "wait"}


@pytest.mark.parametrize(("value", "kind"), pairs([pytest.param(bad, id=ascii(bad)[:30]) for bad in BAD], list(KINDS)))
def test_an_output_that_airflow_cannot_store_fails_the_task_at_once_and_clearly(
    dify: DifyStandIn, kind: str, value: Any
) -> None:
    result = run_with(dify, {"good": 1, "bad": value}, kind)
    task_id = KINDS[kind]
    error = error_of(result, task_id)
    assert isinstance(error, DifyOutputsError)
    assert "'bad'" in str(error)
    assert result.xcoms[task_id]["good"] == 1
    assert result.xcoms[task_id]["workflow_run"]["status"] == "succeeded"
    assert not {"bad", "return_value"} & result.xcoms[task_id].keys()
    assert len(dify.started) <= 1


def test_it_fails_so_wherever_the_wait_was(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    result = run_with(dify, {"good": 1, "bad": {"__id__": 1}}, "operator", **operator_way)
    assert isinstance(error_of(result), DifyOutputsError)
    assert len(dify.started) == 1


def test_what_is_called_storable_reaches_the_next_task(dify: DifyStandIn) -> None:
    outputs = {f"good{number}": value for number, value in enumerate(GOOD)}
    result = run_with(dify, outputs, "operator")
    assert result.state == "success"
    assert ascii(result.received["outputs"]) == ascii(outputs)


# Airflow 3 puts an XCom's key into a URL as it is, and Airflow 3.0 takes no slash there.
NO_KEYS = ["a?b", "a#b", "a%41", "a\nb", "..", "a/../b", *(["a/b", "/a", "a/"] if AIRFLOW_3_0 else [])]
KEYS = ["a b", "a%", "a:b", "a.b", "{a}", *([] if AIRFLOW_3_0 else ["a/b"])]


@pytest.mark.parametrize(("way", "kind"), pairs(list(OPERATOR_WAYS), list(KINDS)))
def test_an_output_whose_name_is_no_xcom_key_is_in_the_return_value_only(
    dify: DifyStandIn, kind: str, way: str
) -> None:
    # Where Airflow would store it under another key, that is one of these.
    outputs = {"a": "of its own", "b": "of its own", **dict.fromkeys([*KEYS, *NO_KEYS], "odd")}
    result = run_with(dify, outputs, kind, **OPERATOR_WAYS[way])
    assert result.state == "success"
    assert result.received["outputs"] == outputs
    xcoms = result.xcoms[KINDS[kind]]
    pushed = {key: value for key, value in xcoms.items() if value in ("odd", "of its own")}
    assert pushed == {key: value for key, value in outputs.items() if AIRFLOW_2 or key not in NO_KEYS}
