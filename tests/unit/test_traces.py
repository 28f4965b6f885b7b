"""Traces: what a start says of the trace and the session that its run belongs to, and what it doesn't."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.operators.dify import DifyRunWorkflowOperator
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator
from airflow_provider_dify.tasks.start import traceparent_of
from tests.dify_stand_in import DifyStandIn
from tests.unit.test_starting import context_of

pytestmark = pytest.mark.usefixtures("dify_connection")

TRACE = {"trace_id": "order-4711_a", "trace_session_id": "manual__2026-01-01T00:00:00+00:00"}
SENT = {"x-trace-id": "order-4711_a", "x-trace-session-id": "manual__2026-01-01T00:00:00+00:00"}
TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def traces_sent_to(dify: DifyStandIn) -> list[dict[str, str]]:
    """Return what each start said of traces; fail if another request said anything of them."""
    said = []
    for request in dify.requests:
        names = {name.lower(): value for name, value in request.headers.items()}
        traces = {name: value for name, value in names.items() if "trace" in name}
        if request.method == "POST" and request.path.endswith("/run"):
            said.append(traces)
        else:
            assert not traces
    return said


def start(**trace: Any) -> Any:
    with DifyHook() as hook, hook.start_workflow_run({}, "airflow", **trace) as run:
        return run.workflow_run_id


def run(**trace: Any) -> Any:
    return DifyHook().run_workflow({}, "airflow", poll_interval=0.05, **trace)


def start_on_a_loop(**trace: Any) -> Any:
    async def ask() -> Any:
        async with DifyAsyncHook() as hook, await hook.start_workflow_run({}, "airflow", **trace) as run:
            return run.workflow_run_id

    return asyncio.run(ask())


def run_on_a_loop(**trace: Any) -> Any:
    async def ask() -> Any:
        async with DifyAsyncHook() as hook:
            return await hook.run_workflow({}, "airflow", poll_interval=0.05, **trace)

    return asyncio.run(ask())


def execute(**arguments: Any) -> Any:
    """Execute the operator, as a task does."""
    carrier = arguments.pop("carrier", None)
    context: Any = context_of(1, 0)
    context["ti"].context_carrier = carrier
    operator = DifyRunWorkflowOperator(
        task_id="t", inputs={}, wait_for_completion=False, do_xcom_push=False, deferrable=False, **arguments
    )
    return operator._begin(context, time.time() + 10).execute()


ask_in_each_way = pytest.mark.parametrize("ask", [start, run, start_on_a_loop, run_on_a_loop, execute])


@ask_in_each_way
def test_a_start_says_which_trace_and_session_its_run_is_in(dify: DifyStandIn, ask: Any) -> None:
    ask(**TRACE)
    assert traces_sent_to(dify) == [SENT]


@ask_in_each_way
def test_a_start_says_nothing_of_traces_by_itself(dify: DifyStandIn, ask: Any) -> None:
    ask()
    assert traces_sent_to(dify) == [{}]


@ask_in_each_way
@pytest.mark.parametrize(
    ("trace", "problem"),
    [
        ({"trace_id": "a b"}, "trace_id must be text of 1 to 128"),
        ({"trace_id": ""}, "trace_id must be"),
        ({"trace_id": "a\n"}, "trace_id must be"),
        ({"trace_id": "é"}, "trace_id must be"),
        ({"trace_id": "a" * 129}, "trace_id must be"),
        ({"trace_id": 1}, "trace_id must be"),
        ({"trace_session_id": "  "}, "trace_session_id must be text of 1 to 200"),
        ({"trace_session_id": "a" * 201}, "trace_session_id must be"),
        ({"trace_session_id": "a\r\nX-Other: b"}, "trace_session_id must be"),
        ({"trace_session_id": "Münster"}, "trace_session_id must be"),
        ({"trace_session_id": 1}, "trace_session_id must be"),
    ],
)
def test_what_dify_would_ignore_or_reject_fails_before_anything_is_sent(
    dify: DifyStandIn, ask: Any, trace: dict[str, Any], problem: str
) -> None:
    with pytest.raises(DifyConfigurationError, match=problem):
        ask(**trace)
    assert dify.requests == []


@pytest.mark.parametrize("trace", [{"trace_id": "a" * 128, "trace_session_id": f"  {'a' * 200} "}])
def test_the_longest_ones_are_sent_without_the_white_space_around_them(
    dify: DifyStandIn, trace: dict[str, str]
) -> None:
    start(**trace)
    assert traces_sent_to(dify) == [{"x-trace-id": "a" * 128, "x-trace-session-id": "a" * 200}]


# --- Airflow's own traces


def test_the_trace_of_a_task_that_airflow_traces_goes_along(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIRFLOW__TRACES__OTEL_ON", "True")
    execute(carrier={"traceparent": TRACEPARENT})
    execute(carrier={"traceparent": TRACEPARENT}, user="another", **TRACE)
    assert traces_sent_to(dify) == [{"traceparent": TRACEPARENT}, {**SENT, "traceparent": TRACEPARENT}]


@pytest.mark.parametrize(
    "carrier",
    [
        None,
        {},
        {"traceparent": None},
        {"traceparent": "x"},
        {"traceparent": f"{TRACEPARENT}\r\nX-Other: 1"},
        # What Airflow's sampler has left out.
        {"traceparent": f"{TRACEPARENT[:-2]}00"},
    ],
)
def test_nothing_goes_along_that_is_no_recorded_trace(monkeypatch: pytest.MonkeyPatch, carrier: Any) -> None:
    monkeypatch.setenv("AIRFLOW__TRACES__OTEL_ON", "True")
    assert traceparent_of(SimpleNamespace(context_carrier=carrier)) is None
    assert traceparent_of(SimpleNamespace()) is None


def test_nothing_goes_along_where_tracing_is_off_although_airflow_3_2_marks_each_task_as_traced() -> None:
    assert traceparent_of(SimpleNamespace(context_carrier={"traceparent": TRACEPARENT})) is None


# --- templates


def test_the_arguments_are_templated() -> None:
    assert {"trace_id", "trace_session_id"} <= set(DifyRunWorkflowOperator.template_fields)
    assert "trace_session_id" in DifyRunWorkflowBatchOperator.template_fields
