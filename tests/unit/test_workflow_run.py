"""What every answer that a server may give becomes, and what a run's state means for a task."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime
from typing import Any

import pytest

from airflow_provider_dify.api.calls import parse_app_info, parse_workflow_run, parse_workflow_run_id
from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.api.models import WorkflowRun, WorkflowRunStatus
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyRequestError,
    DifyWorkflowRunCannotSucceed,
    DifyWorkflowRunFailed,
    DifyWorkflowRunNotFound,
    DifyWorkflowRunTimeout,
)
from airflow_provider_dify.runs.waiting import Outcome, WaitArguments
from tests.dify_stand_in import RECORDED, Recording

RUN_ID = "e9d68a02-335c-48ff-bcca-2aa6ff006579"
KEY = "app-some-key"
NOW = datetime(2026, 11, 21, 23, 0, tzinfo=timezone.utc)


def http_answer(
    status: int = 200,
    body: Any = b"",
    *,
    content_type: str = "application/json",
    headers: dict[str, str] | None = None,
    url: str = f"https://dify.example.com/v1/workflows/run/{RUN_ID}",
) -> HttpResponse:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpResponse(status, {"Content-Type": content_type, **(headers or {})}, raw, url, "my_dify", (KEY,))


def recorded(name: str, **arguments: Any) -> HttpResponse:
    recording = Recording.load(name)
    return http_answer(
        recording.status, recording.body, headers=recording.headers, content_type=recording.headers["Content-Type"],
        **arguments,
    )  # fmt: skip


def read(answer: HttpResponse) -> WorkflowRun:
    return parse_workflow_run(answer, RUN_ID)


def refused(answer: HttpResponse, exception: type[DifyError]) -> Any:
    with pytest.raises(exception) as caught:
        read(answer)
    assert type(caught.value) is exception
    assert "\n" not in str(caught.value)
    assert KEY not in str(caught.value)
    return caught.value


def run_fields(**replaced: Any) -> dict[str, Any]:
    return {**Recording.load("detail_succeeded_echo").fields(), **replaced}


def test_a_recorded_run_is_read_into_types() -> None:
    run = read(recorded("detail_succeeded_echo"))
    assert run.id == RUN_ID
    assert run.status is WorkflowRunStatus.SUCCEEDED
    assert run.outputs is not None
    assert run.outputs["text"] == "héllo 你好 こんにちは 🎉"
    assert run.outputs["obj"] == {"items": [1, "二", None, {"a": "🎉"}], "k": {"n": 1}}
    assert run.inputs is not None
    assert run.inputs["sys.workflow_run_id"] == RUN_ID
    assert run.created_at is not None
    assert run.created_at.isoformat() == "2026-11-21T22:21:04+00:00"
    assert run.created_at.timezone_name == "UTC"
    assert run.elapsed_time == 0.068595
    assert (run.total_steps, run.total_tokens, run.error) == (2, 0, None)


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in RECORDED.glob("detail_*.http") if b'"workflow_id": "' in p.read_bytes())
)
def test_every_recorded_run_is_read(name: str) -> None:
    fields = Recording.load(name).fields()
    run = read(recorded(name))
    assert run.id == fields["id"]
    assert run.status == fields["status"]
    assert isinstance(run.status, WorkflowRunStatus)
    assert run.outputs == (None if fields["outputs"] is None else json.loads(fields["outputs"]))
    assert (run.finished_at is None) == (fields["finished_at"] is None)
    assert json.loads(json.dumps(run.without_payload()))["id"] == run.id


@pytest.mark.parametrize("outputs", [{"a": [1, {"b": "二"}]}, {}])
def test_outputs_are_the_same_as_text_and_as_an_object(outputs: dict[str, Any]) -> None:
    as_text = read(http_answer(body=run_fields(outputs=json.dumps(outputs), inputs=json.dumps(outputs))))
    as_object = read(http_answer(body=run_fields(outputs=outputs, inputs=outputs)))
    assert as_text.outputs == as_text.inputs == as_object.outputs == as_object.inputs == outputs
    assert as_text == as_object


@pytest.mark.parametrize("nothing", [None, "", "null"])
def test_null_outputs_are_none(nothing: str | None) -> None:
    assert read(http_answer(body=run_fields(outputs=nothing))).outputs is None


@pytest.mark.parametrize(
    "value", [1_795_299_664, 1_795_299_664.0, "Sat, 21 Nov 2026 22:21:04 -0000", "Sat, 21 Nov 2026 23:21:04 +0100"]
)
def test_times_are_utc_from_epoch_seconds_and_from_rfc_822(value: object) -> None:
    run = read(http_answer(body=run_fields(created_at=value)))
    assert run.created_at is not None
    assert run.created_at.isoformat() == "2026-11-21T22:21:04+00:00"
    assert run.created_at.timezone_name == "UTC"


def test_a_status_of_the_future_is_kept() -> None:
    assert read(http_answer(body=run_fields(status="resuming"))).status == "resuming"


def test_a_run_does_not_change() -> None:
    with pytest.raises(AttributeError):
        read(recorded("detail_succeeded_echo")).status = "failed"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", 5),
        ("workflow_id", 5),
        ("status", None),
        ("status", 5),
        ("inputs", []),
        ("outputs", []),
        ("outputs", "[1]"),
        ("outputs", "{broken"),
        ("outputs", "[" * 100_000),
        ("outputs", 5),
        ("error", {"a": 1}),
        ("total_steps", "2"),
        ("total_steps", True),
        ("total_tokens", 1.5),
        ("created_at", "yesterday"),
        ("created_at", True),
        ("created_at", 1e300),
        ("finished_at", [1]),
        ("elapsed_time", "0.1"),
        ("elapsed_time", float("nan")),
    ],
)
def test_a_field_of_a_wrong_type_is_named(field: str, value: object) -> None:
    error = refused(http_answer(body=run_fields(**{field: value})), DifyConnectionError)
    assert repr(field) in str(error)
    assert RUN_ID in str(error)
    assert len(str(error)) < 600


@pytest.mark.parametrize(
    "answer",
    [
        recorded("detail_unknown_uuid"),
        http_answer(404, {"code": "not_found", "message": "Workflow run not found.", "status": 404}),
    ],
)
def test_an_unknown_run_is_recognized_in_every_dialect(answer: HttpResponse) -> None:
    error = refused(answer, DifyWorkflowRunNotFound)
    assert error.workflow_run_id == RUN_ID
    assert "my_dify" in str(error)


@pytest.mark.parametrize(
    ("name", "exception", "status", "code", "message"),
    [
        ("auth_none", DifyAuthenticationError, 401, "unauthorized", "Authorization header must be provided"),
        ("auth_bad_key", DifyAuthenticationError, 401, "unauthorized", "Access token is invalid"),
        ("detail_disabled_api", DifyAuthenticationError, 403, "forbidden", "API service has been disabled"),
        ("detail_key_of_chat_app", DifyRequestError, 400, "not_workflow_app", "app mode matches the right API"),
        ("detail_not_a_uuid", DifyConnectionError, 500, "unknown", "Internal Server Error"),
        ("run_rate_limited_streaming", DifyConnectionError, 400, "invalid_param", "Too many requests."),
    ],
)
def test_recorded_errors_keep_what_dify_said(
    name: str, exception: type[DifyError], status: int, code: str, message: str
) -> None:
    error = refused(recorded(name), exception)
    assert (error.status_code, error.code) == (status, code)
    assert message in error.message
    assert message in str(error)
    assert code in str(error)
    assert RUN_ID in str(error)


@pytest.mark.parametrize(
    ("status", "body", "exception"),
    [
        (400, {"message": "Too many requests. Please try again later."}, DifyConnectionError),
        (401, {"message": "Too many requests. Please try again later."}, DifyAuthenticationError),
        (405, {"message": "Too many requests. Please try again later."}, DifyRequestError),
        (400, {"message": "too few"}, DifyRequestError),
        (400, {"code": "invalid_param"}, DifyRequestError),
        (400, {"code": None, "message": None}, DifyConnectionError),
        (400, {"status": 400}, DifyConnectionError),
    ],
)
def test_an_error_names_its_status_and_what_there_is_of_code_and_message(
    status: int, body: dict[str, Any], exception: type[DifyError]
) -> None:
    error = refused(http_answer(status, body, headers={"X-Version": "1.12.1"}), exception)
    assert (error.code, error.message) == (body.get("code"), body.get("message"))
    assert str(error).startswith(f"{body.get('message') or body.get('code') or 'The response'} ")
    assert getattr(error, "is_overloaded", False) == (status == 400 and "Too many" in (body.get("message") or ""))


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 524])
@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b'{"message": "busy", "code": "x"}', b"[1]"])
def test_temporary_failures_are_recognized_with_any_body(status: int, body: bytes) -> None:
    assert refused(http_answer(status, body), DifyConnectionError).status_code == status


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("7", 7),
        ("0", 0),
        (timedelta(seconds=90), 90),
        (timedelta(seconds=-90), 0),
        ("soon", None),
        ("-5", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_read_in_seconds_and_as_a_date(header: str | timedelta | None, expected: float | None) -> None:
    if isinstance(header, timedelta):
        header = format_datetime(datetime.now(timezone.utc) + header, usegmt=True)
    headers = {} if header is None else {"retry-after": header}
    error = refused(http_answer(429, b"{}", headers=headers), DifyConnectionError)
    assert error.retry_after == (expected if expected is None else pytest.approx(expected, abs=2))


@pytest.mark.parametrize(
    ("answer", "shown"),
    [
        (
            http_answer(200, b"<html>\n<title>Sign in</title>", content_type="text/html"),
            "HTTP 200, text/html, '<html> ",
        ),
        (http_answer(200, b""), "an empty body"),
        (http_answer(200, b"[1, 2]"), r"\[1, 2\]"),
        (http_answer(200, {"status": "ok"}), "without the fields 'id' and 'status'"),
        (http_answer(200, {"id": RUN_ID}), "without the fields 'id' and 'status'"),
        (http_answer(200, b'{"id": "trunc'), '"trunc'),
        (http_answer(200, b"\xff\xfe\x00junk"), "junk"),
        (http_answer(404, {"detail": "Not Found"}), "Not Found"),
        (http_answer(418, b"teapot", content_type="text/plain"), "text/plain, 'teapot'"),
        (
            http_answer(302, b"", headers={"location": "https://elsewhere.example.com/"}),
            "redirect to https://elsewhere",
        ),
        (recorded("detail_no_v1_prefix"), "404 Not Found"),
        (recorded("detail_double_slash"), "redirect to http://127.0.0.1:5001/v1/workflows/run/"),
    ],
)
def test_what_is_not_dify_is_shown_in_a_line(answer: HttpResponse, shown: str) -> None:
    error = refused(answer, DifyConnectionError)
    assert re.search(shown, str(error))
    assert error.status_code == answer.status_code
    assert len(str(error)) < 700


def test_a_missing_v1_is_hinted_at() -> None:
    without = recorded("detail_no_v1_prefix", url=f"https://dify.example.com/workflows/run/{RUN_ID}")
    assert "/v1: is that missing" in str(refused(without, DifyConnectionError))
    assert "missing" not in str(refused(recorded("detail_no_v1_prefix"), DifyConnectionError))


@pytest.mark.parametrize("status", [200, 400, 401, 404, 500])
@pytest.mark.parametrize("padding", range(0, 130, 13))
def test_a_server_that_echoes_the_api_key_gets_it_into_no_message(status: int, padding: int) -> None:
    echo = {"message": "x" * padding + KEY, "code": KEY, "headers": {"Authorization": f"Bearer {KEY}"}}
    with pytest.raises(DifyError) as caught:
        read(http_answer(status, echo, content_type=f"text/{KEY}", headers={"Location": f"/{KEY}"}))
    assert KEY not in str(caught.value)
    assert KEY not in repr(vars(caught.value))
    assert KEY[:-1] not in str(caught.value)


@pytest.mark.parametrize("location", [f"https://elsewhere.example.com/{KEY}", f"https://x:{KEY}@example.com/"])
def test_a_redirect_that_echoes_the_api_key_is_shown_without_it(location: str) -> None:
    error = refused(http_answer(302, b"", headers={"Location": location}), DifyConnectionError)
    assert "a redirect to https://" in str(error)
    assert "***" in str(error)
    assert KEY not in str(error)


@pytest.mark.parametrize("value", [{KEY: 1}, [KEY], {"a": f"Bearer {KEY}"}])
def test_a_field_of_a_wrong_type_that_echoes_the_api_key_is_shown_without_it(value: object) -> None:
    error = refused(http_answer(body=run_fields(error=value)), DifyConnectionError)
    assert "'error'" in str(error)
    assert "***" in str(error)
    assert KEY not in str(error)


@pytest.mark.parametrize(
    "spelling", [RUN_ID, RUN_ID.upper(), RUN_ID.replace("-", ""), f"{{{RUN_ID}}}", f"urn:uuid:{RUN_ID}"]
)
def test_a_run_id_may_be_spelled_as_any_uuid(spelling: str) -> None:
    assert parse_workflow_run_id(spelling) == RUN_ID


@pytest.mark.parametrize("wrong", ["", "None", None, 5, "../info", f"{RUN_ID}/x", ["a"], {"id": RUN_ID}, "x" * 5000])
def test_anything_else_as_a_run_id_is_shown(wrong: object) -> None:
    with pytest.raises(DifyConfigurationError, match="workflow_run_id must be the UUID") as caught:
        parse_workflow_run_id(wrong)
    assert repr(wrong)[:100] in str(caught.value)
    assert len(str(caught.value)) < 500


def test_the_app_is_read() -> None:
    app = parse_app_info(recorded("app_info"))
    assert (app.name, app.mode, app.has_workflow_runs) == ("echo", "workflow", True)
    assert not parse_app_info(recorded("app_info_chat")).has_workflow_runs
    assert parse_app_info(http_answer(body={"name": "old"})).has_workflow_runs
    with pytest.raises(DifyConnectionError, match="'name'"):
        parse_app_info(http_answer(body={"version": 1}))


# --- what a run means for a task


def make_run(status: str, **fields: Any) -> WorkflowRun:
    return read(http_answer(body=run_fields(status=status, **fields)))


@pytest.mark.parametrize(
    ("run", "arguments", "outcome", "reason"),
    [
        (make_run("running", finished_at=None), {}, Outcome.WAIT, "is running"),
        (make_run("paused", finished_at=None), {}, Outcome.WAIT, "is paused"),
        (make_run("scheduled", finished_at=None), {}, Outcome.WAIT, "is scheduled"),
        (make_run("resuming", finished_at=None), {}, Outcome.WAIT, "is resuming"),
        # Dify may write the end of a paused run and let it continue all the same.
        (make_run("paused"), {}, Outcome.WAIT, "is paused and waits for a person"),
        (make_run("running"), {}, Outcome.WAIT, "is running"),
        (make_run("succeeded"), {}, Outcome.DONE, "succeeded after 0.1 seconds and 2 steps"),
        (make_run("partial-succeeded"), {}, Outcome.DONE, "error handling"),
        (
            make_run("partial-succeeded"),
            {"fail_on_partial_success": True},
            Outcome.FAILED,
            "fail_on_partial_success is set",
        ),
        (
            make_run("failed", error="out of tokens"),
            {},
            Outcome.FAILED,
            r"^out of tokens\. Dify workflow run .* failed after 0.1 seconds and 2 steps",
        ),
        (make_run("stopped"), {}, Outcome.FAILED, "no error text.*was stopped"),
        (make_run("failed", elapsed_time=None, total_steps=1), {}, Outcome.FAILED, "1 step\\."),
        (make_run("cancelled"), {}, Outcome.FAILED, "'cancelled', which this version"),
        (
            make_run("running", finished_at=None),
            {"run_timeout": 3600},
            Outcome.WAIT,
            "is running",
        ),
        (
            make_run("running", finished_at=None),
            {"run_timeout": 60},
            Outcome.TIMED_OUT,
            r"still running 2336 seconds.*run_timeout is 60 seconds.*orphaned",
        ),
        (make_run("paused", finished_at=None), {"run_timeout": 60}, Outcome.TIMED_OUT, "waits for a person"),
        (make_run("running", created_at=None, finished_at=None), {"run_timeout": 0}, Outcome.WAIT, "is running"),
        (make_run("succeeded"), {"run_timeout": 0}, Outcome.DONE, "succeeded"),
    ],
)  # fmt: skip
def test_what_a_run_means_for_a_task(
    run: WorkflowRun, arguments: dict[str, Any], outcome: Outcome, reason: str
) -> None:
    verdict = WaitArguments(**arguments).judge(run, NOW)
    assert verdict.outcome is outcome
    assert re.search(reason, verdict.reason)
    assert run.id in verdict.reason
    assert verdict.is_warning == (run.status == "partial-succeeded" and outcome is Outcome.DONE)
    if outcome in (Outcome.FAILED, Outcome.TIMED_OUT):
        with pytest.raises(DifyWorkflowRunFailed) as caught:
            verdict.raise_if_failed(run)
        assert caught.value.run is run
        assert str(caught.value) == verdict.reason
        assert isinstance(caught.value, DifyWorkflowRunTimeout) == (outcome is Outcome.TIMED_OUT)
        # A sensor, which starts nothing again, is not retried.
        assert isinstance(caught.value, DifyWorkflowRunCannotSucceed) == (outcome is Outcome.FAILED)
    else:
        verdict.raise_if_failed(run)


@pytest.mark.parametrize(
    ("run", "can_be_repeated"),
    [
        (make_run("failed", error="out of tokens"), True),
        (make_run("stopped", error="Stopped by user."), False),
        (make_run("stopped", error="Aborted: the worker is shutting down"), True),
        (make_run("partial-succeeded"), True),
        (make_run("cancelled"), True),
    ],
)
def test_only_a_task_that_starts_again_is_retried_and_only_where_that_may_help(
    run: WorkflowRun, can_be_repeated: bool
) -> None:
    verdict = WaitArguments(fail_on_partial_success=True).judge(run, NOW)
    assert (verdict.is_failure, verdict.can_be_repeated) == (True, can_be_repeated)
    for starts_again in (True, False):
        with pytest.raises(DifyWorkflowRunFailed) as caught:
            verdict.raise_if_failed(run, starts_again=starts_again)
        is_retried = type(caught.value) is DifyWorkflowRunFailed
        assert is_retried == (starts_again and can_be_repeated)
        assert is_retried or type(caught.value) is DifyWorkflowRunCannotSucceed


def test_a_run_that_1_16_1_ends_after_a_form_may_have_its_outputs() -> None:
    error = "Aborted: Client response stream closed before app execution completed"
    advice = "Its outputs may be complete: see the exception's run"
    assert advice in WaitArguments().judge(make_run("stopped", error=error), NOW).reason
    # The other text it has for that, which it has for a stop by a person, too: such a run has no outputs.
    error = "Aborted: App task was stopped"
    assert advice in WaitArguments().judge(make_run("stopped", error=error, outputs={"text": "q"}), NOW).reason
    assert WaitArguments().judge(make_run("stopped", error=error, outputs={}), NOW).reason.endswith("2 steps.")


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (
            make_run("partial-succeeded"),
            "At least one node failed and its error handling (default value or fail branch) took over: Dify workflow "
            f"run {RUN_ID} is partial-succeeded after 0.1 seconds and 2 steps. fail_on_partial_success is set.",
        ),
        (
            make_run("stopped", error=None),
            f"Dify gave no error text. Dify workflow run {RUN_ID} was stopped after 0.1 seconds and 2 steps.",
        ),
        (
            make_run("stopped", error="Client response stream closed before app execution completed"),
            "Client response stream closed before app execution completed. "
            f"Dify workflow run {RUN_ID} was stopped after 0.1 seconds and 2 steps. Dify 1.16.0 and 1.16.1 end "
            "runs like this that were paused for a person, although their nodes ran to the end. Its outputs may be "
            "complete: see the exception's run, or the run in Dify's console.",
        ),
        (
            make_run("paused", finished_at=None),
            f"Dify workflow run {RUN_ID} is still paused 2336 seconds after it was created (run_timeout is 60 "
            "seconds). It waits for a person at a Human Input node.",
        ),
        (
            make_run("running", finished_at=None),
            f"Dify workflow run {RUN_ID} is still running 2336 seconds after it was created (run_timeout is 60 "
            "seconds). Such a record is usually orphaned: the server that ran it was killed, or it was stopped and "
            "Dify did not write that down. Look at the run in Dify's log and start a new one.",
        ),
        (
            make_run("cancelled", error="e"),
            f"e. Dify workflow run {RUN_ID} finished with the status 'cancelled', which this version of "
            "airflow-provider-dify does not know after 0.1 seconds and 2 steps.",
        ),
    ],
)
def test_a_failure_is_explained_in_whole_sentences(run: WorkflowRun, reason: str) -> None:
    assert WaitArguments(fail_on_partial_success=True, run_timeout=60).judge(run, NOW).reason == reason


@pytest.mark.parametrize("end", ["!", "?", "…", "."])
def test_an_error_that_is_a_sentence_gets_no_second_full_stop(end: str) -> None:
    assert (
        WaitArguments()
        .judge(make_run("failed", error=f"broken{end}"), NOW)
        .reason.startswith(f"broken{end} Dify workflow run")
    )


@pytest.mark.parametrize(
    ("fields", "facts"),
    [
        ({"elapsed_time": None, "total_steps": None}, "failed."),
        ({"elapsed_time": 1.26, "total_steps": None}, "failed after 1.3 seconds."),
        ({"elapsed_time": None, "total_steps": 2}, "failed 2 steps."),
        ({"elapsed_time": 1.0, "total_steps": 1}, "failed after 1.0 seconds and 1 step."),
    ],
)
def test_a_reason_has_the_facts_that_there_are(fields: dict[str, Any], facts: str) -> None:
    reason = WaitArguments().judge(make_run("failed", error="e", **fields), NOW).reason
    assert reason == f"e. Dify workflow run {RUN_ID} {facts}"


@pytest.mark.parametrize(
    ("status", "node", "reason"),
    [
        ("failed", None, "no such model. Dify"),
        ("failed", "Node 'Ask' (llm) failed: no such model.", "Node 'Ask' (llm) failed: no such model. Dify"),
        (
            "failed",
            "Node 'Ask' (llm) failed: out of tokens.",
            "Node 'Ask' (llm) failed: out of tokens. no such model. Dify",
        ),
        ("failed", "Node 'Ask' (llm) failed: ", "Node 'Ask' (llm) failed:  no such model. Dify"),
        ("failed", "Node 'Ask' (llm)", "Node 'Ask' (llm) no such model. Dify"),
        ("succeeded", "Node 'Ask' (llm) failed: no such model.", "Dify workflow run"),
        ("running", "Node 'Ask' (llm) failed: no such model.", "Dify workflow run"),
    ],
)
def test_a_failure_names_its_node_and_says_the_nodes_error_once(status: str, node: str | None, reason: str) -> None:
    verdict = WaitArguments().judge(make_run(status, error="no such model"), NOW)
    named = verdict.because_of(node)
    assert named.reason.startswith(reason)
    assert (named.outcome, named.can_be_repeated) == (verdict.outcome, verdict.can_be_repeated)


@pytest.mark.parametrize(
    ("error", "node", "reason"),
    [
        ("HTTP 404!", "Node 'A' (llm) failed: HTTP 404.", "Node 'A' (llm) failed: HTTP 404! Dify"),
        ("a failed: b", "Node 'A' (llm) failed: a failed: b.", "Node 'A' (llm) failed: a failed: b. Dify"),
    ],
)
def test_a_nodes_error_is_separated_from_its_name(error: str, node: str, reason: str) -> None:
    assert WaitArguments().judge(make_run("failed", error=error), NOW).because_of(node).reason.startswith(reason)


def test_a_run_is_overdue_only_after_its_time() -> None:
    run = make_run("running", finished_at=None)
    assert run.created_at is not None
    for age, outcome in ((99, Outcome.WAIT), (100, Outcome.WAIT), (101, Outcome.TIMED_OUT)):
        verdict = WaitArguments(run_timeout=100).judge(run, run.created_at + timedelta(seconds=age))
        assert verdict.outcome is outcome
        assert verdict.can_be_repeated is False
