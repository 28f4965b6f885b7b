"""When a trigger renders a sensor's templates, within which time, and what it says where that fails."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger
from tests.dify_stand_in import DifyStandIn

if CAN_START_FROM_TRIGGER:
    import greenback  # Airflow's triggerer has it since then.

pytestmark = [
    pytest.mark.usefixtures("dify_connection"),
    pytest.mark.skipif(not CAN_START_FROM_TRIGGER, reason="this Airflow cannot start a task on the triggerer"),
]


class NoAnswer:
    """What a template asks Airflow for, where Airflow does not respond: the triggerer awaits it within the template."""

    def __str__(self) -> str:
        return str(greenback.await_(asyncio.sleep(30, "too late")))


def event_of(template: str, context: dict[str, Any], **arguments: Any) -> tuple[dict[str, Any], float]:
    """Let a trigger render a run's id and wait for that run; return its event, and the seconds that it took."""
    trigger = DifyWorkflowRunTrigger(template, **{"poll_interval": 0.05, **arguments})
    # As the triggerer does for a task that starts there.
    trigger.template_fields = ("workflow_run_id",)
    trigger.render_template_fields(context)

    async def run() -> dict[str, Any]:
        await greenback.ensure_portal()
        (event,) = [event async for event in trigger.run()]
        return dict(event.payload)

    began = time.monotonic()
    return asyncio.run(run()), time.monotonic() - began


def test_the_template_is_rendered_and_its_run_waited_for(dify: DifyStandIn) -> None:
    run_id = dify.add_run("succeeded")
    event, seconds = event_of("{{ params.run }}", {"params": {"run": run_id}})
    assert (event["workflow_run_id"], event["end"]) == (run_id, "run_is_over")
    # No worker has to be seen to have ended before its task may resume.
    assert seconds < DifyWorkflowRunTrigger.resume_delay / 2


@pytest.mark.parametrize("deadline_in", [None, 60.0])
def test_a_template_that_raises_fails_the_wait_and_says_why(dify: DifyStandIn, deadline_in: float | None) -> None:
    deadline = None if deadline_in is None else time.time() + deadline_in
    event, _ = event_of("{{ params['no such'].run }}", {"params": {}}, deadline=deadline)
    assert event["end"] == "failed"
    assert event["message"].startswith("UndefinedError: ")
    assert event["message"].endswith("no such': the sensor's templates could not be rendered on the triggerer.")
    assert dify.requests == []


@pytest.mark.parametrize(
    ("render_timeout", "deadline_in", "limit"),
    [(1.0, None, 1), (1.0, 300.0, 1), (300.0, 1.2, 1), (300.0, -5.0, 0)],
    ids=["its own limit", "its own limit comes first", "the task's timeout comes first", "the task's timeout is over"],
)
def test_a_template_that_airflow_does_not_answer_ends_within_its_time(
    dify: DifyStandIn,
    monkeypatch: pytest.MonkeyPatch,
    render_timeout: float,
    deadline_in: float | None,
    limit: int,
) -> None:
    monkeypatch.setattr(DifyWorkflowRunTrigger, "render_timeout", render_timeout)
    deadline = None if deadline_in is None else time.time() + deadline_in
    event, seconds = event_of("{{ params.run }}", {"params": {"run": NoAnswer()}}, deadline=deadline)
    assert event["end"] == "failed"
    assert event["message"].startswith(f"Airflow did not respond for {limit} seconds")
    assert seconds >= limit * 0.9
    assert seconds < 20
    assert dify.requests == []
