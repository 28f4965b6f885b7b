"""An error's address leads to the section of Failures that has a row for its message."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify import DOCUMENTATION, __version__
from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER, XCOMS_ARE_STRICT_JSON
from airflow_provider_dify.api import calls
from airflow_provider_dify.api.session import load_bundle
from airflow_provider_dify.batch.output import ReturnedOutput
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.batch.resuming import EarlierTries
from airflow_provider_dify.batch.rows import read_rows
from airflow_provider_dify.exceptions import BATCH_SECTION, DifyError
from airflow_provider_dify.runs.storage import storage_path
from airflow_provider_dify.runs.waiting import WaitArguments
from airflow_provider_dify.runs.wanted import parse_time
from airflow_provider_dify.tasks.arguments import parse_count, parse_limit, parse_seconds
from airflow_provider_dify.triggers.templates import argument_for_triggerer
from tests.dify_stand_in import Recording
from tests.failures_page import begins_as, raised_errors, sections
from tests.unit.test_connection import read as read_connection
from tests.unit.test_workflow_run import http_answer
from tests.unit.test_workflow_run import read as read_run

FIRST_TRY = EarlierTries(0.0, False, 0)
ARGUMENT, CONNECTION, REJECTED = "an-argument-cant-work", "the-connection-cant-be-used", "dify-rejects-the-request"
AWAY = "dify-cant-be-reached-or-cant-answer"
ENDED, STARTED = "the-run-ended-without-success", "the-start-of-a-run"
# Rows of what is no task's error: a part of a message, an ImportError, and what the Test button or Airflow says.
NO_ERRORS = {
    "Dify workflow run … has succeeded, and its outputs are in the XComs",
    "must be text, not …. With render_template_as_native_obj=True a template gives that",
    "Python 3.13 and later refuse the certificate",
    "its extra is no JSON object",
    "The API key works, but it belongs to the app",
    "DifyWorkflowRunsTrigger needs Airflow 3.0 or later",
    "The sensor has timed out after … seconds",
}
# In a variable, because two places raise it; the sensor's own tests do.
ELSEWHERE = {"start_from_trigger=True does not go with a mapped sensor"}


def raised(error: DifyError) -> None:
    raise error


def start_with(code: str | None, status: int) -> None:
    raised(calls.error_from_start_event({"code": code, "message": "No", "status": status}, None))


def dify_says(status: int, code: str) -> None:
    body = {"code": code, "message": "No", "status": status}
    calls.parse_app_info(http_answer(status, body))


ON_LATER_AIRFLOWS: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: argument_for_triggerer("workflow_run_id", 7), ARGUMENT, "must be text for start_from_trigger=True"),
    (lambda: argument_for_triggerer("workflow_run_id", "{{ a"), ARGUMENT, "is no template"),
]
ON_AIRFLOW_3: list[tuple[Callable[[], Any], str, str]] = [
    (
        lambda: ReturnedOutput(1, FIRST_TRY).add(
            RowResult(0, "succeeded", outputs={"a": float("nan")}, workflow_run_id="r")
        ),
        BATCH_SECTION,
        "which Airflow cannot store as an XCom",
    ),
]


def judge(name: str = "detail_failed", fields: dict[str, Any] | None = None, **arguments: Any) -> None:
    recording = Recording.load(name)
    run = read_run(http_answer(200, {**recording.fields(), **(fields or {})}))
    WaitArguments(**arguments).judge(run).raise_if_failed(run)


CASES: list[tuple[Callable[[], Any], str, str]] = [
    (judge, ENDED, " failed"),
    (lambda: judge("detail_stopped"), ENDED, "was stopped"),
    (lambda: judge("detail_partial_default", fail_on_partial_success=True), ENDED, "fail_on_partial_success is set"),
    (lambda: judge("detail_running_t0", run_timeout=1), ENDED, "seconds after it was created"),
    (lambda: judge(fields={"status": "new"}), ENDED, "finished with the status"),
    (lambda: read_connection(password=""), CONNECTION, "it has no password"),
    (lambda: read_connection(password="{app-some-key}"), CONNECTION, "its password stands in braces or quotes"),
    (lambda: read_connection(password="app-a b"), CONNECTION, "its password holds white space or characters"),
    (lambda: read_connection(password="dataset-key").check_key(), CONNECTION, "knowledge base"),
    (lambda: read_connection(port=8443), CONNECTION, "it has no host"),
    (lambda: read_connection(host="dify", schema="v1"), CONNECTION, "the schema must be http or https"),
    (lambda: read_connection(host="http://dify", schema="https"), CONNECTION, "the schema says"),
    (lambda: read_connection(host="dify:1", port=2), CONNECTION, "the port says"),
    (lambda: read_connection(host="dify:port"), CONNECTION, "has no valid port"),
    (lambda: read_connection(host="dify", port=99999), CONNECTION, "is no port"),
    (lambda: read_connection(host="ftp://dify"), CONNECTION, "the host must be an http or https URL"),
    (lambda: read_connection(host="https://me@dify"), CONNECTION, "the host holds a user name or password"),
    (lambda: read_connection(host="https://dify?x=1"), CONNECTION, "has a query or a fragment"),
    (lambda: read_connection(host="dify dify"), CONNECTION, "makes no URL"),
    (lambda: read_connection(host="https://dify/v 1"), CONNECTION, "has a path that makes no URL"),
    (lambda: read_connection(host="https://cloud.dify.ai"), CONNECTION, "the host is Dify Cloud's console"),
    (lambda: read_connection(host="https://dify/v1/workflows/run"), CONNECTION, "is the address of one request"),
    (lambda: read_connection(extra={"timeout": "soon"}), CONNECTION, "the extra 'timeout' must be"),
    (lambda: read_connection(extra={"verify": "/missing"}), CONNECTION, "the extra 'verify' must be"),
    (lambda: read_connection(extra={"proxies": "no"}), CONNECTION, "the extra 'proxies' must be"),
    (lambda: read_connection(extra={"headers": "no"}), CONNECTION, "the extra 'headers' must be an object of texts"),
    (lambda: read_connection(extra={"headers": {"a b": "c"}}), CONNECTION, "in the extra 'headers' is none"),
    (lambda: read_connection(extra={"headers": {"Accept": "c"}}), CONNECTION, "the extra 'headers' cannot set"),
    (lambda: read_connection(extra={"headers": {"X-Key": "ключ"}}), CONNECTION, "in the extra 'headers' must be"),
    (lambda: read_connection(extra={"console_url": "no"}), CONNECTION, "the extra 'console_url' must be"),
    (lambda: read_connection(extra={"files_url": "no"}), CONNECTION, "the extra 'files_url' must be"),
    (lambda: load_bundle("/missing"), CONNECTION, "does not exist on this machine"),
    (lambda: calls.parse_workflow_run_id("None"), ARGUMENT, "must be the UUID that Dify returned"),
    (lambda: calls.check_user(""), ARGUMENT, "user must be text of 1 to"),
    (lambda: calls.encode_start({"a": float("nan")}, "user"), ARGUMENT, "inputs must be an object of JSON values"),
    (lambda: parse_count("max_consecutive_failures", -1), ARGUMENT, "must be a whole number"),
    (lambda: parse_limit("max_failed_runs", 1.5), ARGUMENT, "or a share of the rows"),
    (lambda: parse_seconds("run_timeout", "soon"), ARGUMENT, "must be a number of seconds or a timedelta"),
    (lambda: parse_time("created_after", None), ARGUMENT, "must be a datetime or the ISO 8601 text of one"),
    (lambda: read_rows(7), ARGUMENT, "inputs must be a list of dicts"),
    (lambda: read_rows("[{}]"), ARGUMENT, "inputs is a text, not a list of dicts"),
    (lambda: read_rows("rows.txt"), ARGUMENT, "The file of inputs must end in"),
    (lambda: ReturnedOutput(1_001, FIRST_TRY), ARGUMENT, "rows, and at most"),
    (lambda: storage_path("nowhere://a/b"), BATCH_SECTION, "could not be"),
    (lambda: start_with("invalid_param", 400), STARTED, "Dify rejected the inputs and started no"),
    (lambda: start_with("app_unavailable", 400), REJECTED, "Dify rejected the start of a workflow run"),
    (lambda: start_with(None, 500), ENDED, "Dify failed to start a workflow run"),
    (lambda: dify_says(401, "unauthorized"), REJECTED, "Dify refused the API key of"),
    (lambda: dify_says(400, "not_workflow_app"), REJECTED, "Dify rejected the request for"),
    (lambda: dify_says(503, "away"), AWAY, "Dify could not respond for"),
    *(ON_LATER_AIRFLOWS if CAN_START_FROM_TRIGGER else ()),
    *(ON_AIRFLOW_3 if XCOMS_ARE_STRICT_JSON else ()),
]


@pytest.mark.parametrize(("fail", "section", "words"), CASES, ids=[words for _, _, words in CASES])
def test_an_error_ends_with_the_address_of_its_section_in_this_version(
    fail: Callable[[], Any], section: str, words: str
) -> None:
    with pytest.raises(DifyError) as caught:
        fail()
    assert words in str(caught.value)
    assert any(words in message for message, found in sections().items() if section in found)
    # On the way from a trigger to the task, and between processes, the address stays the same.
    event = DifyError.from_event(json.loads(json.dumps(caught.value.to_event())))
    for error in (caught.value, event, pickle.loads(pickle.dumps(caught.value))):
        assert str(error.with_address()).endswith(f"/blob/v{__version__}/docs/failures.md#{section}")
        assert DOCUMENTATION in str(error)


def test_every_row_of_an_error_is_raised_here_or_has_its_section_where_it_is_raised() -> None:
    texts = {text for text, _ in raised_errors()}
    words = [words for _, _, words in (*CASES, *ON_LATER_AIRFLOWS, *ON_AIRFLOW_3)]
    # What a row's log or result says, and what a trigger logs, is no task's error.
    errors = {
        message
        for message, found in sections().items()
        if found - {"warnings", "the-triggerer", "the-exceptions", BATCH_SECTION}
    }
    left = {m for m in errors if not any(begins_as(m, text) for text in texts) and not any(word in m for word in words)}
    assert left == NO_ERRORS | ELSEWHERE
