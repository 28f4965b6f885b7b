"""What the response to each request means, and which request an error names."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest

from airflow_provider_dify.api.calls import (
    error_from_start,
    parse_app_info,
    parse_log,
    parse_parameters,
    parse_stop,
    parse_uploaded_file_id,
    parse_workflow_run,
)
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.http_response import HttpResponse, without_key
from airflow_provider_dify.api.models import REASON_LENGTH, LoggedWorkflowRun, WorkflowRunStatus
from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyConnectionError,
    DifyError,
    DifyInputsRejected,
    DifyRequestError,
)
from tests.unit.test_workflow_run import http_answer, recorded

RUN_ID = "e9d68a02-335c-48ff-bcca-2aa6ff006579"
URL = "https://dify.example.com/v1/somewhere"

# Each parser, and how its errors name the request.
PARSERS: dict[str, Callable[[HttpResponse], Any]] = {
    f"workflow run {RUN_ID}": lambda response: parse_workflow_run(response, RUN_ID),
    "the app's name": parse_app_info,
    "the app's input form": parse_parameters,
    "the app's log of workflow runs": parse_log,
    "the uploaded file": parse_uploaded_file_id,
    "the stop of a workflow run": parse_stop,
}
RUN, APP, FORM, LOG, UPLOAD, STOP = PARSERS
RUNNING = {"id": RUN_ID, "status": "running"}
# What each response of Dify has, and none of a gateway in front of it.
OF_DIFY = {"X-Version": "1.12.1"}


def failure_of(parse: Callable[[HttpResponse], Any], response: HttpResponse) -> DifyError:
    with pytest.raises(DifyError) as caught:
        parse(response)
    return caught.value


@pytest.mark.parametrize("subject", PARSERS)
@pytest.mark.parametrize(
    ("status", "body", "expected", "message"),
    [
        (200, b"<html>", DifyConnectionError, "The response for {} at {} is no JSON object (HTTP 200, "),
        (200, [1], DifyConnectionError, "The response for {} at {} is no JSON object (HTTP 200, "),
        (301, b"", DifyConnectionError, "The response for {} at {} is no response of Dify's (HTTP 301, "),
        (503, b"", DifyConnectionError, ": Dify could not respond for {} at {}. This may pass."),
        (401, b"{}", DifyAuthenticationError, ": Dify refused the API key of connection 'my_dify' when asked for {}."),
        (
            400,
            {"code": "c", "message": "m"},
            DifyRequestError,
            "m (HTTP 400 c): Dify rejected the request for {} with ",
        ),
    ],
)
def test_an_error_names_what_was_asked_for(
    subject: str, status: int, body: Any, expected: type[DifyError], message: str
) -> None:
    error = failure_of(PARSERS[subject], http_answer(status, body, url=URL, headers=OF_DIFY))
    assert type(error) is expected
    assert message.format(subject, URL) in str(error)
    # The cause comes first: what Dify said, or else what came.
    cause = "m (HTTP 400 c): " if status == 400 else f"HTTP {status}, application/json, "
    assert str(error).startswith(("The response for ", cause))
    assert (error.code, error.message) == (("c", "m") if status == 400 else (None, None))
    assert error.status_code == status


@pytest.mark.parametrize(
    ("subject", "body", "what"),
    [
        (RUN, {"id": RUN_ID}, "JSON without the fields 'id' and 'status'"),
        (RUN, {"status": "running"}, "JSON without the fields 'id' and 'status'"),
        (APP, {"mode": "workflow"}, "JSON without the field 'name'"),
        (LOG, {"rows": []}, "JSON without the list 'data'"),
        (LOG, {"data": {}}, "JSON without the list 'data'"),
        (LOG, {"data": ["a"]}, "a list with a row that has no 'workflow_run'"),
        (LOG, {"data": [{}]}, "a list with a row that has no 'workflow_run'"),
        (LOG, {"data": [{"workflow_run": "a"}]}, "a list with a row that has no 'workflow_run'"),
    ],
)
def test_json_of_another_service_is_distinguished_from_difys(subject: str, body: Any, what: str) -> None:
    error = failure_of(PARSERS[subject], http_answer(200, body, url=URL))
    assert type(error) is DifyConnectionError
    assert str(error).startswith(f"The response for {subject} at {URL} is {what} (HTTP 200, ")


@pytest.mark.parametrize(
    ("subject", "field", "body"),
    [
        (RUN, "error", {"id": RUN_ID, "status": "failed", "error": 5}),
        (APP, "name", {"name": 5}),
        (APP, "mode", {"name": "n", "mode": 5}),
        (LOG, "id", {"data": [{"workflow_run": {"id": 5}}]}),
        (LOG, "session_id", {"data": [{"workflow_run": RUNNING, "created_by_end_user": {"session_id": 5}}]}),
        (LOG, "created_at", {"data": [{"workflow_run": RUNNING, "created_at": "soon"}]}),
        (UPLOAD, "id", {"id": 5}),
    ],
)
def test_a_field_of_a_wrong_type_says_of_which_request(subject: str, field: str, body: Any) -> None:
    error = failure_of(PARSERS[subject], http_answer(200, body, url=URL, headers={"X-Version": "1.12.1"}))
    assert type(error) is DifyConnectionError
    assert str(error).startswith(f"The field {field!r} must be ")
    assert f"this provider cannot read the response for {subject} at {URL}. " in str(error)
    assert (error.status_code, error.server_version) == (200, "1.12.1")


@pytest.mark.parametrize(
    ("field", "value", "expected", "shown"),
    [
        ("id", 5, "text or null", "5"),
        ("id", "", "an id", "''"),
        ("id", "a\nb", "an id", repr("a\nb")),
        ("id", "a" * 101, "an id", repr("a" * 101)),
        ("status", None, "text", "None"),
        ("error", 5, "text or null", "5"),
        ("total_steps", "2", "a whole number or null", "'2'"),
        ("elapsed_time", "0.1", "a number or null", "'0.1'"),
        ("outputs", "[1]", "an object, the JSON text of one, or null", "'[1]'"),
        ("created_at", [1], "epoch seconds, RFC 822 text or null", "[1]"),
    ],
)
def test_a_field_of_a_wrong_type_says_what_it_must_be_and_what_it_is(
    field: str, value: Any, expected: str, shown: str
) -> None:
    error = failure_of(PARSERS[RUN], http_answer(200, {**RUNNING, field: value}))
    assert str(error).startswith(f"The field {field!r} must be {expected}, but it is {shown}: this provider")


def test_a_field_that_is_missing_says_so() -> None:
    error = failure_of(PARSERS[LOG], http_answer(200, {"data": [{"workflow_run": {"id": "a"}}]}))
    assert str(error).startswith("The field 'status' must be text, but it is nothing: this provider")


def test_an_id_may_be_short_or_long_and_a_status_is_cut() -> None:
    for run_id in ("a", "a" * 100):
        run = parse_workflow_run(http_answer(200, {"id": run_id, "status": "s" * 200}), run_id)
        assert (run.id, run.status) == (run_id, "s" * 50 + "…")


def test_a_time_without_a_zone_is_utc() -> None:
    run = parse_workflow_run(http_answer(200, {**RUNNING, "created_at": "Sat, 21 Nov 2026 22:20:28 -0000"}), RUN_ID)
    assert run.created_at == datetime(2026, 11, 21, 22, 20, 28, tzinfo=timezone.utc)


@pytest.mark.parametrize(("status", "is_overloaded"), [(429, True), (408, False), (425, False), (500, False)])
def test_only_too_many_requests_say_that_dify_is_overloaded(status: int, is_overloaded: bool) -> None:
    error = failure_of(PARSERS[RUN], http_answer(status, b"", headers={"retry-after": "7"}))
    assert isinstance(error, DifyConnectionError)
    assert (error.is_overloaded, error.retry_after) == (is_overloaded, 7.0)


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("Sat, 21 Nov 2020 22:20:28 GMT", 0.0),
        ("Sat, 21 Nov 2020 22:20:28 -0000", 0.0),
        ("Sat, 21 Nov 2020 22:20:28 +0100", 0.0),
        ("tomorrow", None),
    ],
)
def test_a_time_that_has_passed_asks_for_no_pause(header: str, seconds: float | None) -> None:
    assert http_answer(429, headers={"Retry-After": header}).retry_after() == seconds


def test_what_dify_said_is_cut() -> None:
    error = failure_of(PARSERS[RUN], http_answer(400, {"message": "m" * 100_000}, headers=OF_DIFY))
    assert error.message == "m" * REASON_LENGTH + "…"


def test_a_response_names_its_connection_and_shows_no_secret() -> None:
    connection = DifyConnection(conn_id="my_dify", base_url="https://dify.example.com/v1", api_key="app-a-long-key")
    response = HttpResponse.received(connection, URL, 200, {}, b"is app-a-long-key")
    assert (response.status_code, response.url, response.body) == (200, URL, b"is ***")
    assert response.connection_name == "connection 'my_dify'"
    assert response.shown("is app-a-long-key") == "is ***"
    assert "app-a-long-key" not in repr(response)


@pytest.mark.parametrize(("key", "shown"), [("1234567", b"is 1234567"), ("12345678", b"is ***")])
def test_a_key_that_may_be_part_of_a_word_stays_in_a_body(key: str, shown: bytes) -> None:
    assert without_key(f"is {key}".encode(), key) == shown


def test_a_key_of_another_kind_of_app_is_named() -> None:
    hint = " The API key belongs to an app of another kind: use the key of the workflow app that made the run."
    for code in ("not_workflow_app", "other"):
        error = failure_of(PARSERS[RUN], http_answer(400, {"code": code, "message": "m"}, headers=OF_DIFY))
        assert str(error).endswith(f"with connection 'my_dify'.{hint if code == 'not_workflow_app' else ''}")


@pytest.mark.parametrize(("status", "is_shown"), [(299, False), (300, True), (399, True), (400, False), (404, False)])
def test_only_a_redirect_says_where_it_leads(status: int, is_shown: bool) -> None:
    error = failure_of(PARSERS[APP], http_answer(status, b"", headers={"location": "https://elsewhere.example/"}))
    assert ("is a redirect to https://elsewhere.example/, where the API key is not sent" in str(error)) is is_shown


def test_a_row_of_the_log_has_all_that_dify_says_of_a_run() -> None:
    row, *_ = parse_log(recorded("logs"))
    (logged_run,) = parse_log(
        http_answer(
            200,
            {
                "data": [
                    {
                        "workflow_run": {
                            "id": RUN_ID,
                            "version": "v",
                            "status": "failed",
                            "triggered_from": "app-run",
                            "error": "broken",
                            "elapsed_time": 0.5,
                            "total_tokens": 7,
                            "total_steps": 2,
                            "created_at": 1_700_000_000,
                            "finished_at": 1_700_000_001,
                            "exceptions_count": 3,
                        },
                        "created_by_end_user": {"session_id": "Rig"},
                        "created_at": 1_700_000_002,
                    }
                ]
            },
        )
    )
    moments: list[Any] = [datetime.fromtimestamp(1_700_000_000 + second, timezone.utc) for second in range(3)]
    assert logged_run == LoggedWorkflowRun(
        workflow_run_id=RUN_ID,
        status=WorkflowRunStatus.FAILED,
        user="Rig",
        error="broken",
        total_steps=2,
        total_tokens=7,
        created_at=moments[0],
        finished_at=moments[1],
        elapsed_time=0.5,
        exceptions_count=3,
        triggered_from="app-run",
        version="v",
        logged_at=moments[2],
    )
    assert (row.triggered_from, row.exceptions_count, row.user) == ("app-run", 0, "Rig")


@pytest.mark.parametrize("end_user", [None, "somebody", 5])
def test_a_run_that_no_end_user_started_has_no_user(end_user: Any) -> None:
    body = {"data": [{"workflow_run": {"id": RUN_ID, "status": "running"}, "created_by_end_user": end_user}]}
    (run,) = parse_log(http_answer(200, body))
    assert (run.user, run.status, run.created_at) == (None, "running", None)


def test_a_form_and_a_file_are_read() -> None:
    assert parse_parameters(http_answer(200, {"user_input_form": [1]})) == {"user_input_form": [1]}
    assert parse_uploaded_file_id(http_answer(201, {"id": "a"})) == "a"


START = "the start of a workflow run"


@pytest.mark.parametrize(
    ("status", "body", "expected", "message"),
    [
        (200, {"a": 1}, DifyConnectionError, f"The response for {START} at {URL} is no event stream (HTTP 200, "),
        (200, b"<html>", DifyConnectionError, f"The response for {START} at {URL} is no JSON object (HTTP 200, "),
        (401, {"code": "unauthorized"}, DifyAuthenticationError, f" for {START}. Check the connection's password"),
        (400, {"code": "invalid_param", "message": "query is required in input form"}, DifyInputsRejected,
         "query is required in input form (HTTP 400 invalid_param): Dify rejected"),
        (400, {"code": "invalid_param"}, DifyRequestError, "invalid_param (HTTP 400 invalid_param): Dify rejected"),
        (400, {"code": "invalid_param", "message": "user"}, DifyRequestError, f"the request for {START} with "),
        (400, {"code": "other", "message": "input"}, DifyRequestError, "input (HTTP 400 other): Dify rejected"),
        (404, {"code": "invalid_param", "message": "input"}, DifyRequestError, "input (HTTP 404 invalid_param): Dify "),
        (429, {"code": "rate_limit_error", "message": "no credits"}, DifyRequestError,
         "no credits: Dify refused to start a workflow run with connection 'my_dify', because the quota"),
        (429, {"code": "rate_limit_error"}, DifyRequestError, "The quota is used up: Dify refused to start"),
        (429, {"code": "too_many_requests"}, DifyConnectionError, f"could not respond for {START} at {URL}. This may"),
        (503, {"code": "rate_limit_error"}, DifyConnectionError, f"could not respond for {START} at {URL}. This may"),
    ],
)  # fmt: skip
def test_a_start_without_events_says_why_nothing_runs(
    status: int, body: Any, expected: type[DifyError], message: str
) -> None:
    error = error_from_start(http_answer(status, body, url=URL, headers={"X-Version": "1.12.1"}))
    assert type(error) is expected
    assert message in str(error)
    known = body if isinstance(body, dict) else {}
    assert (error.status_code, error.server_version) == (status, "1.12.1")
    assert (error.code, error.message) == (known.get("code"), known.get("message"))
