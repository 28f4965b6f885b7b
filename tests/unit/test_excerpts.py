"""Texts of Dify in messages, logs and events: one bounded line that forges nothing."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from airflow_provider_dify.api.models import as_text, one_line, redact
from airflow_provider_dify.exceptions import DifyError, DifyWorkflowRunFailed
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import RunWait, WaitArguments
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger
from tests.dify_stand_in import DifyStandIn, gateway, rejects, respond

FORGED = "boom\r\n[2026-01-01] INFO - all is well\x1b[31m\u202e\x00\u2028"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a  b\n\tc", "a b c"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("二🎉", "二🎉"),
        ("\ud800", "\\ud800"),
        ("left\u202eright", "left\\u202eright"),
        ("x" * 600, "x" * 500 + "…"),
        ({"a": [1, "\n"]}, "{'a': [1, '\\n']}"),
        (None, "None"),
    ],
)
def test_a_text_becomes_one_printable_line(text: object, line: str) -> None:
    assert one_line(text) == line


def test_a_huge_text_costs_nothing_and_becomes_a_line() -> None:
    assert len(one_line("a\n" * 5_000_000)) <= 501
    assert as_text("x") == "x"


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("key abcd1234 ok", "key *** ok"),
        ("http://bob:abcd1234@proxy/x", "http://***@proxy/x"),
        ("http://bob:other@proxy:3128", "http://***@proxy:3128"),
        ("mail to a@b.c", "mail to a@b.c"),
    ],
)
def test_secrets_are_redacted_the_longest_first(text: str, redacted: str) -> None:
    assert redact(text, ["abcd", "abcd1234", ""]) == redacted


def failing_run(**fields: Any) -> Any:
    return respond(200, json.dumps({"id": "x", "status": "failed", "inputs": {}, "outputs": {}, **fields}))


@pytest.mark.parametrize("status", [400, 500, 401])
def test_dify_cannot_forge_a_line_of_a_tasks_log(
    dify: DifyStandIn, dify_connection: str, status: int, capfd: pytest.CaptureFixture[str]
) -> None:
    dify.misbehave_always(rejects(status, FORGED, FORGED))
    with DifyHook(retry_limit=1, retry_delay=0.001) as hook, pytest.raises(DifyError, match="boom") as caught:
        hook.get_app_info()
    assert str(caught.value).isprintable()
    assert caught.value.message.isprintable()
    assert not any(line.startswith("[2026-01-01]") for line in "".join(capfd.readouterr()).splitlines())
    is_good, message = hook.test_connection()
    assert (is_good, message.isprintable()) == (False, True)


def test_the_error_of_a_run_is_one_line_in_the_exception_and_whole_in_the_run(
    dify: DifyStandIn, dify_connection: str
) -> None:
    import logging

    dify.misbehave_always(failing_run(error=FORGED + "x" * 1000))
    with DifyHook() as hook:
        run = hook.get_workflow_run("2d7a7544-770c-496f-8ef9-4e622682b330")
    wait = RunWait(run.id, WaitArguments(), log=logging.getLogger("wait"))  # type: ignore[arg-type]
    with pytest.raises(DifyWorkflowRunFailed) as caught:
        wait.on_poll(run).raise_if_failed(run, starts_again=True)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    assert caught.value.run.error == FORGED + "x" * 1000


@pytest.mark.parametrize(
    "fault",
    [
        failing_run(error="e" * 5_000_000),
        failing_run(error="e" * 5_000_000, status="s" * 5_000_000),
        failing_run(status="s" * 5_000_000, finished_at=None),
        failing_run(total_steps="9" * 4000),
        rejects(400, "c" * 5_000_000, "m" * 5_000_000),
        gateway(403, {"code": "c" * 5_000_000, "message": "m" * 5_000_000}),
        respond(502, "<html>" + "x" * 5_000_000, content_type="text/html"),
        respond(302, headers={"Location": "http://other.example/" + "x" * 5000, "X-Version": "9" * 3000}),
    ],
)
@pytest.mark.usefixtures("quick_resumption")
def test_the_event_of_a_trigger_and_the_xcom_of_the_run_stay_small(
    dify: DifyStandIn, dify_connection: str, fault: Any
) -> None:
    dify.misbehave_always(fault)
    run_id = "2d7a7544-770c-496f-8ef9-4e622682b330"

    async def wait() -> list[Any]:
        trigger = DifyWorkflowRunTrigger(run_id, poll_interval=0.01, max_consecutive_failures=0, deadline=0.0)
        return [event.payload async for event in trigger.run()]

    (payload,) = asyncio.run(wait())
    assert len(json.dumps(payload)) < 8000
    if payload["error"] is None:
        with DifyHook() as hook:
            assert len(json.dumps(hook.get_workflow_run(run_id).without_payload())) < 50_000
