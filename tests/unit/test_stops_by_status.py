"""A run was stopped if its status says so, whatever Dify's text says: there are three, and more may come."""

from __future__ import annotations

from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyWorkflowRunCannotSucceed
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import Outcome, WaitArguments
from tests.dify_stand_in import DifyStandIn, Start
from tests.unit.test_contradicted_events import STARTED, said_finished
from tests.unit.test_running_task import task_in
from tests.unit.test_starting import context_of

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")

TEXTS = (
    "Aborted: User requested stop",
    "Aborted: App task was stopped",
    "Stopped by user.",
    "The run was halted.",
    None,
)

whatever_it_says = pytest.mark.parametrize("text", TEXTS)


@pytest.fixture
def default_dialect() -> str:
    return "current"


@whatever_it_says
def test_a_run_that_was_stopped_fails_the_task_without_retry(dify: DifyStandIn, text: str | None) -> None:
    dify.starts.append(Start(statuses=("running", "stopped"), fields={"error": text}, cut="workflow_started"))
    with DifyHook(retry_limit=0) as hook, pytest.raises(DifyWorkflowRunCannotSucceed, match="was stopped") as caught:
        task_in(context_of(1, 2), hook, waits=True).execute()
    assert caught.value.run is not None
    assert (caught.value.run.status, caught.value.run.error) == ("stopped", text)


@whatever_it_says
def test_a_stop_that_only_the_events_tell_of_is_one(dify: DifyStandIn, text: str | None, short_grace: Any) -> None:
    dify.starts.append(Start(raw=(STARTED, said_finished("stopped", error=text)), statuses=("running",)))
    run = DifyHook().run_workflow({}, "me", poll_interval=0.05, timeout=8)
    assert (run.status, run.error) == ("stopped", text)
    verdict = WaitArguments().judge(run)
    assert (verdict.outcome, verdict.can_be_repeated) == (Outcome.FAILED, False)


@pytest.mark.parametrize("text", ["Stopped by user.", "the tool said: App task was stopped"])
def test_a_run_that_failed_is_no_stop_because_its_text_reads_like_one(dify: DifyStandIn, text: str) -> None:
    run = DifyHook().get_workflow_run(dify.add_run("failed", error=text))
    verdict = WaitArguments().judge(run)
    assert (run.status, verdict.can_be_repeated) == ("failed", True)
