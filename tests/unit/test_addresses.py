"""An error's address leads to the section of Failures that has a row for its message."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from airflow_provider_dify import DOCUMENTATION, __version__
from airflow_provider_dify.airflow_versions import CAN_START_FROM_TRIGGER, XCOMS_ARE_STRICT_JSON
from airflow_provider_dify.api import calls, responses
from airflow_provider_dify.api.session import load_bundle
from airflow_provider_dify.batch.results import ReturnedResults, RowResult
from airflow_provider_dify.batch.rows import read_rows
from airflow_provider_dify.batch.storage import storage_path
from airflow_provider_dify.exceptions import BATCH_SECTION, DifyError
from airflow_provider_dify.runs.wanted import parse_time
from airflow_provider_dify.tasks.arguments import parse_count, parse_limit, parse_seconds
from airflow_provider_dify.triggers.templates import argument_for_triggerer
from tests.failures_page import sections
from tests.unit.test_connection import read as read_connection
from tests.unit.test_workflow_run import http_answer

ARGUMENT, CONNECTION, REJECTED = "an-argument-cant-work", "the-connection-cant-be-used", "dify-rejects-the-request"
AWAY = "dify-cant-be-reached-or-cant-answer"


def raised(error: DifyError) -> None:
    raise error


def start_with(code: str | None, status: int) -> None:
    raised(responses.error_from_start_event({"code": code, "message": "No", "status": status}, None))


def dify_says(status: int, code: str) -> None:
    body = {"code": code, "message": "No", "status": status}
    responses.parse_app_info(http_answer(status, body))


ON_LATER_AIRFLOWS: list[tuple[Callable[[], Any], str, str]] = [
    (lambda: argument_for_triggerer("workflow_run_id", 7), ARGUMENT, "must be text for start_from_trigger=True"),
    (lambda: argument_for_triggerer("workflow_run_id", "{{ a"), ARGUMENT, "is no template"),
]
ON_AIRFLOW_3: list[tuple[Callable[[], Any], str, str]] = [
    (
        lambda: ReturnedResults(1).add(RowResult(0, "succeeded", outputs={"a": float("nan")}, workflow_run_id="r")),
        BATCH_SECTION,
        "which Airflow cannot store as an XCom",
    ),
]
CASES: list[tuple[Callable[[], Any], str, str]] = [
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
    (lambda: read_connection(extra={"console_url": "no"}), CONNECTION, "the extra 'console_url' must be"),
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
    (lambda: ReturnedResults(1_001), ARGUMENT, "rows, and at most"),
    (lambda: storage_path("nowhere://a/b"), BATCH_SECTION, "could not be"),
    (lambda: start_with("invalid_param", 400), "the-start-of-a-run", "Dify rejected the inputs and started no"),
    (lambda: start_with("app_unavailable", 400), REJECTED, "Dify rejected the start of a workflow run"),
    (lambda: start_with(None, 500), "the-run-ended-without-success", "Dify failed to start a workflow run"),
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
