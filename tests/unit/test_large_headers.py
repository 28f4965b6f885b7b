"""A gateway adds kilobytes of headers to each response of Dify's, which are no reason to fail for any client."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from airflow_provider_dify.hooks.dify import DifyHook
from tests.dify_stand_in import DifyStandIn, Start
from tests.unit.test_run_workflow import RunWorkflow, on_a_worker, on_an_event_loop
from tests.unit.test_trigger import payload_of, trigger_of

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries", "quick_resumption")


@pytest.fixture(autouse=True)
def policy(dify: DifyStandIn) -> None:
    dify.added_headers = {"Content-Security-Policy": f"default-src {'x' * 9_000}"}


def look_up(run_id: str) -> str:
    with DifyHook(retry_limit=0) as hook:
        return str(hook.get_workflow_run(run_id).status)


def wait(run_id: str) -> str:
    return str(payload_of(trigger_of(run_id, max_consecutive_failures=0))["status"])


@pytest.mark.parametrize("ask", [look_up, wait])
def test_a_run_is_looked_up_behind_large_headers(dify: DifyStandIn, ask: Callable[[str], str]) -> None:
    assert ask(dify.add_run("succeeded")) == "succeeded"


@pytest.mark.parametrize("run_workflow", [on_a_worker, on_an_event_loop])
def test_a_run_is_started_and_followed_behind_large_headers(dify: DifyStandIn, run_workflow: RunWorkflow) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": {"a": 1}}, cut="workflow_started"))
    assert run_workflow({}, "me", timeout=60).outputs == {"a": 1}
    assert len(dify.started) == 1
