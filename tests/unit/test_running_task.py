"""One try of the operator, after another one was killed."""

from __future__ import annotations

import logging
import time
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.running_task import RunningTask
from airflow_provider_dify.starting import StartMemory, new_start
from airflow_provider_dify.task_clock import TaskClock
from airflow_provider_dify.task_xcoms import TaskXComs
from tests.dify_stand_in import DifyStandIn, respond
from tests.unit.test_starting import Store, context_of, settings_of

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")


def retry_of_a_killed_start(hook: DifyHook) -> RunningTask:
    """Return the second try of a task whose first one was killed when it had just sent its start."""
    store = Store()
    first = context_of(1, 2)
    StartMemory({**first, "task_state_store": store}).save(new_start(first["ti"], None, {"q": "1"}, (), time.time()))
    context: Any = context_of(2, 2, store)
    operator = SimpleNamespace(multiple_outputs=False, do_xcom_push=False)
    return RunningTask(
        settings_of(poll_interval=0.05, not_found_grace=0.2, max_consecutive_failures=2),
        context,
        hook,
        TaskClock(time.time() + 60),
        logging.getLogger(__name__),
        TaskXComs(operator, context),
    )


def test_a_retry_starts_nothing_as_long_as_the_log_can_not_say_what_the_killed_try_has_started(
    dify: DifyStandIn,
) -> None:
    looks = iter(range(1000))

    async def fail_after_the_first_look(request: Any) -> Any:
        return await dify.respond_to(request) if next(looks) == 0 else await respond(503)(request)

    dify.misbehave_always(fail_after_the_first_look, only="GET .*/logs")
    with DifyHook(retry_limit=0) as hook, pytest.raises(DifyConnectionError):
        retry_of_a_killed_start(hook).start()
    assert dify.started == []


def test_a_retry_starts_a_run_once_the_log_has_shown_none_for_the_grace(dify: DifyStandIn) -> None:
    dify.misbehave(respond(503), times=3, only="GET .*/logs")
    with DifyHook(retry_limit=0) as hook:
        task = retry_of_a_killed_start(hook)
        with pytest.raises(DifyConnectionError):
            task.start()
        assert dify.started == []
        task.start()
        task.close()
    assert len(dify.started) == 1
