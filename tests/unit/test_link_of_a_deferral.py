"""The XCom of a deferred task's link is pushed once: by the worker, or else by the triggerer."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import TaskDeferred

from airflow_provider_dify.sensors.dify import DifyWorkflowRunSensor
from airflow_provider_dify.tasks.xcoms import RUN_LOG
from tests.dify_stand_in import DifyStandIn, respond

pytestmark = pytest.mark.usefixtures("dify_connection", "quick_retries")


def deferral_of(dify: DifyStandIn) -> tuple[dict[str, Any], list[str]]:
    """Let a sensor poll once and defer; return its trigger's arguments, and the keys of the XComs that it pushed."""
    pushed: list[str] = []
    sensor = DifyWorkflowRunSensor(task_id="wait", workflow_run_id=dify.add_run("running"), deferrable=True)
    ti = SimpleNamespace(xcom_push=lambda key, value: pushed.append(key))
    with pytest.raises(TaskDeferred) as deferred:
        sensor.poke({"ti": ti})
    return json.loads(json.dumps(deferred.value.trigger.serialize()[1])), pushed


def test_a_worker_that_has_pushed_the_link_says_so_to_the_triggerer(dify: DifyStandIn) -> None:
    arguments, pushed = deferral_of(dify)
    assert (arguments["has_link"], pushed) == (True, [RUN_LOG])


def test_a_worker_whose_poll_failed_leaves_the_link_to_the_triggerer(dify: DifyStandIn) -> None:
    dify.misbehave_always(respond(503))
    arguments, pushed = deferral_of(dify)
    assert (arguments["has_link"], pushed) == (False, [])
