"""A response to a start that names its run in a header, before any event and before there is a record."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyWorkflowRunUncertain
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.log import RunSearch
from airflow_provider_dify.tasks.start import STATE_KEY, TaskDefers, TaskStart
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger
from tests.dify_stand_in import PING, DifyStandIn, Start
from tests.unit.test_running_task import task_in
from tests.unit.test_starting import Store, context_of

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries", "quick_resumption")


@pytest.fixture
def default_dialect() -> str:
    return "current"


@pytest.fixture(autouse=True)
def announces_runs(dify: DifyStandIn) -> None:
    dify.announces_runs = True


def looks_into_the_log(dify: DifyStandIn) -> int:
    return sum("/workflows/logs" in request.path for request in dify.requests)


@pytest.mark.parametrize("user", ["me", None])
def test_a_run_whose_stream_breaks_off_before_any_event_is_known_by_its_id(dify: DifyStandIn, user: str | None) -> None:
    # Two runs of one user and the same inputs, which the log would not tell apart.
    dify.starts.extend([Start(cut=0), Start(raw=(PING,), statuses=("running", "succeeded"))])
    with DifyHook(retry_limit=0) as hook:
        for _ in range(2):
            outputs = task_in(context_of(1, 2, Store()), hook, user=user, waits=True, not_found_grace=2).execute()
            assert isinstance(outputs, dict)
    assert len(dify.started) == 2
    # One look before each start of a user of one's own, and none after it.
    assert looks_into_the_log(dify) <= 2


def test_the_hook_finds_it_by_its_id_too(dify: DifyStandIn) -> None:
    dify.starts.append(Start(raw=(PING,), statuses=("running", "succeeded")))
    run = DifyHook().run_workflow({}, "me", poll_interval=0.05, timeout=8)
    assert run.id == dify.started[0].workflow_run_id


def test_a_run_without_an_event_is_named_when_the_time_is_over(dify: DifyStandIn) -> None:
    dify.starts.append(Start(raw=(PING, 5.0), statuses=("running",)))
    with DifyHook().start_workflow_run({}, "me", timeout=0.5) as run:
        assert (run.workflow_run_id, run.task_id) == (dify.started[0].workflow_run_id, "")


def test_the_error_of_a_stream_that_breaks_off_names_the_run(dify: DifyStandIn) -> None:
    dify.starts.append(Start(raw=(PING,), statuses=("running",)))
    with pytest.raises(DifyWorkflowRunUncertain) as caught:
        DifyHook().start_workflow_run({}, "me", timeout=5)
    assert f"no event of workflow run {dify.started[0].workflow_run_id} came back" in str(caught.value)
    assert len(dify.started) == 1


def test_a_queued_run_is_remembered_and_waited_for_by_its_id(
    dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_BEFORE_QUEUED", 0.1)
    monkeypatch.setattr("airflow_provider_dify.tasks.task_try.SECONDS_BEFORE_DEFERRAL", 0.2)
    dify.slots = 0
    store = Store()
    with DifyHook(retry_limit=0) as hook:
        task = task_in(context_of(1, 2, store), hook, waits=True, deferrable=True)
        with pytest.raises(TaskDefers):
            task.execute()
    remembered = TaskStart.deserialize(store.get(STATE_KEY))
    assert remembered is not None
    (started,) = dify.started
    assert remembered.search.announced_id == started.workflow_run_id
    assert remembered.workflow_run_id is None

    async def wait() -> Any:
        search = RunSearch.serialize(remembered.search)
        trigger = DifyWorkflowRunTrigger(None, poll_interval=0.05, search=search, deadline=time.time() + 10)
        return [event.payload async for event in trigger.run()]

    before = looks_into_the_log(dify)
    threading.Timer(0.5, lambda: setattr(dify, "slots", 1)).start()
    (payload,) = asyncio.run(wait())
    assert (payload["workflow_run_id"], payload["status"]) == (started.workflow_run_id, "succeeded")
    assert looks_into_the_log(dify) == before


def test_a_header_that_is_no_uuid_says_nothing(dify: DifyStandIn) -> None:
    dify.announces_runs = False
    dify.echoes_inputs = True
    dify.added_headers = {"X-Workflow-Run-ID": "../../info"}
    dify.starts.append(Start(cut=0))
    run = DifyHook().run_workflow({"q": "1"}, "me", poll_interval=0.05, timeout=8)
    assert run.id == dify.started[0].workflow_run_id
    assert looks_into_the_log(dify) >= 2


def test_the_events_say_the_rest(dify: DifyStandIn) -> None:
    with DifyHook().start_workflow_run({}, "me") as run:
        assert (run.workflow_run_id, run.task_id) == (dify.started[0].workflow_run_id, dify.started[0].task_id)
        assert [event.name for event in run][-1] == "workflow_finished"


def test_a_search_from_before_this_version_knows_no_id() -> None:
    assert RunSearch.deserialize({"user": "me", "sent_at": 1.0, "user_is_unique": True}).announced_id == ""
