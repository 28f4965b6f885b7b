"""The hook in a function of ``@task``: what people write who need more than the operator does."""

from __future__ import annotations

import pytest

from tests.airflow.airflow_runs import run_dag, without_masking
from tests.dify_stand_in import API_KEY, DifyStandIn, Start

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

BODY = """
@task(on_failure_callback=raised)
def ask(question):
    from airflow_provider_dify.hooks.dify import DifyHook

    with DifyHook() as hook:
        run = hook.run_workflow({"query": question}, "analyst", poll_interval=0.05, timeout=TIMEOUT)
        again = hook.wait_for_workflow_run(run.id, poll_interval=0.05)
    received("run", run)
    received("again", again)
    return run.outputs

@task
def use(outputs):
    received("outputs", outputs)

use(ask("why?"))
"""


@pytest.mark.usefixtures("dialect")
def test_a_task_runs_a_workflow_and_hands_its_outputs_on(
    dify: DifyStandIn, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), fields={"outputs": {"answer": "二"}}))
    result = run_dag(BODY.replace("TIMEOUT", "30"))
    assert result.state == "success"
    assert result.received["outputs"] == {"answer": "二"}
    assert result.received["run"].id == result.received["again"].id == dify.started[0].workflow_run_id
    assert dify.started[0].inputs == {"query": "why?"}
    assert API_KEY not in without_masking("".join(capfd.readouterr()) + caplog.text)


def test_a_task_whose_run_is_not_over_in_time_fails(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running",), cut="workflow_started", then="pings"))
    result = run_dag(BODY.replace("TIMEOUT", "0.5"))
    assert result.states["ask"] == "failed"
    assert "The hook's timeout of 0.5 seconds is over" in str(result.raised["ask"][0])
