"""A gateway adds kilobytes of headers to each response of Dify's, which are no reason to fail in any way to wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from tests.airflow.airflow_runs import run_dag, run_operator, run_sensor
from tests.dify_stand_in import DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

OUTPUTS = {"answer": "ok"}


@pytest.fixture(autouse=True)
def policy(dify: DifyStandIn) -> None:
    dify.added_headers = {"Content-Security-Policy": f"default-src {'x' * 9_000}"}


def test_a_sensor_gets_its_outputs_behind_large_headers(dify: DifyStandIn, sensor_way: dict[str, Any]) -> None:
    run_id = dify.add_run("running", "succeeded", outputs=OUTPUTS)
    assert run_sensor(workflow_run_id=run_id, **sensor_way).received["outputs"] == OUTPUTS


def test_an_operator_gets_its_outputs_behind_large_headers(dify: DifyStandIn, operator_way: dict[str, Any]) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": OUTPUTS}))
    assert run_operator(**operator_way).received["outputs"] == OUTPUTS
    assert len(dify.started) == 1


def test_a_batch_gets_its_outputs_behind_large_headers(dify: DifyStandIn) -> None:
    dify.starts += [Start(fields={"outputs": OUTPUTS})] * 3
    result = run_dag(
        """
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        DifyRunWorkflowBatchOperator(
            task_id="run", inputs=[{"n": n} for n in range(3)], poll_interval=0.05, not_found_grace=0.2
        )
        """
    )
    assert [row["outputs"] for row in result.xcoms["run"]["return_value"]] == [OUTPUTS] * 3
    assert len(dify.started) == 3


def test_the_hook_on_an_event_loop_starts_a_run_behind_large_headers(dify: DifyStandIn) -> None:
    dify.starts.append(Start(fields={"outputs": OUTPUTS}))

    async def run() -> Any:
        async with DifyAsyncHook() as hook:
            return (await hook.run_workflow({}, "me", poll_interval=0.05, timeout=10)).outputs

    assert asyncio.run(run()) == OUTPUTS
