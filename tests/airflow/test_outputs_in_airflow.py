"""Outputs that Airflow can't store: one clear error without a retry, and everything else is there."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER, XCOMS_ARE_STRICT_JSON
from airflow_provider_dify.exceptions import DifyOutputsError
from tests.airflow.airflow_processes import AIRFLOW_2, AIRFLOW_3_0
from tests.airflow.airflow_runs import DagRunResult, run_operator, run_sensor
from tests.dify_stand_in import DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

WAYS: list[dict[str, Any]] = [{}, {"deferrable": True}, *([{"end_from_trigger": True}] if CAN_END_FROM_TRIGGER else [])]


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


@pytest.mark.parametrize("kind", ["operator", "sensor"])
@pytest.mark.parametrize("value", BAD, ids=lambda value: ascii(value)[:30])
def test_an_output_that_airflow_cannot_store_fails_the_task_at_once_and_clearly(
    dify: DifyStandIn, kind: str, value: Any
) -> None:
    result = run_with(dify, {"good": 1, "bad": value}, kind)
    task_id = {"operator": "run", "sensor": "wait"}[kind]
    assert result.states[task_id] == "failed"
    assert result.tries[task_id] == 1
    (error,) = result.raised[task_id]
    assert isinstance(error, DifyOutputsError)
    assert "'bad'" in str(error)
    assert result.xcoms[task_id]["good"] == 1
    assert result.xcoms[task_id]["workflow_run"]["status"] == "succeeded"
    assert not {"bad", "return_value"} & result.xcoms[task_id].keys()
    assert len(dify.started) <= 1


@pytest.mark.parametrize("way", WAYS)
def test_it_fails_so_wherever_the_wait_was(dify: DifyStandIn, way: dict[str, Any]) -> None:
    result = run_with(dify, {"good": 1, "bad": {"__id__": 1}}, "operator", **way)
    (error,) = result.raised["run"]
    assert isinstance(error, DifyOutputsError)
    assert result.tries["run"] == 1
    assert len(dify.started) == 1


@pytest.mark.parametrize("value", GOOD, ids=lambda value: ascii(value)[:30])
def test_what_is_called_storable_reaches_the_next_task(dify: DifyStandIn, value: Any) -> None:
    result = run_with(dify, {"good": value}, "operator")
    assert result.state == "success"
    assert ascii(result.received["outputs"]) == ascii({"good": value})


# Airflow 3 puts an XCom's key into a URL as it is, and Airflow 3.0 takes no slash there.
NO_KEYS = ["a?b", "a#b", "a%41", "a\nb", "..", "a/../b", *(["a/b", "/a", "a/"] if AIRFLOW_3_0 else [])]
KEYS = ["a b", "a%", "a:b", "a.b", "{a}", *([] if AIRFLOW_3_0 else ["a/b"])]


@pytest.mark.parametrize("kind", ["operator", "sensor"])
@pytest.mark.parametrize("arguments", WAYS)
def test_an_output_whose_name_is_no_xcom_key_is_in_the_return_value_only(
    dify: DifyStandIn, kind: str, arguments: dict[str, Any]
) -> None:
    # Where Airflow would store it under another key, that is one of these.
    outputs = {"a": "of its own", "b": "of its own", **dict.fromkeys([*KEYS, *NO_KEYS], "odd")}
    result = run_with(dify, outputs, kind, **arguments)
    assert result.state == "success"
    assert result.received["outputs"] == outputs
    xcoms = result.xcoms[{"operator": "run", "sensor": "wait"}[kind]]
    pushed = {key: value for key, value in xcoms.items() if value in ("odd", "of its own")}
    assert pushed == {key: value for key, value in outputs.items() if AIRFLOW_2 or key not in NO_KEYS}
