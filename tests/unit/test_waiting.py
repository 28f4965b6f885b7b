"""What a series of polls means for a wait: when it goes on, what it logs, and what ends it."""

from __future__ import annotations

import asyncio
import logging
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError, DifyError, DifyRequestError, DifyWorkflowRunNotFound
from airflow_provider_dify.runs.log import delay_after
from airflow_provider_dify.runs.waiting import (
    Deadline,
    Outcome,
    RunWait,
    TriggerWait,
    WaitArguments,
    error_from_event,
)
from tests.unit.test_workflow_run import RUN_ID, make_run

LOG = logging.getLogger("waiting")
RUNNING = make_run("running", finished_at=None, created_at=None, total_steps=0)


@pytest.fixture(autouse=True)
def all_lines(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "waiting")


def wait_of(*, first_poll: datetime | None = None, on_first_run: Any = None, **arguments: Any) -> RunWait:
    return RunWait(RUN_ID, WaitArguments(**arguments), log=LOG, first_poll=first_poll, on_first_run=on_first_run)


def ago(seconds: float) -> datetime:
    return datetime.now(timezone.utc) - timedelta(seconds=seconds)


# --- polls that succeed


@pytest.mark.parametrize(
    ("run", "policy", "outcome", "level"),
    [
        (RUNNING, {}, Outcome.WAIT, logging.INFO),
        (make_run("succeeded"), {}, Outcome.DONE, logging.INFO),
        (make_run("partial-succeeded"), {}, Outcome.DONE, logging.WARNING),
        (make_run("partial-succeeded"), {"fail_on_partial_success": True}, Outcome.FAILED, None),
        (make_run("failed"), {}, Outcome.FAILED, None),
        (make_run("running", finished_at=None), {"run_timeout": 1.0}, Outcome.TIMED_OUT, None),
        (make_run("running", finished_at=None), {"run_timeout": 1e12}, Outcome.WAIT, logging.INFO),
    ],
)
def test_a_poll_is_judged_and_logged_once_unless_it_becomes_an_exception(
    caplog: pytest.LogCaptureFixture, run: Any, policy: dict[str, Any], outcome: Outcome, level: int | None
) -> None:
    wait = wait_of(**policy)
    verdicts = [wait.on_poll(run), wait.on_poll(run)]
    assert [verdict.outcome for verdict in verdicts] == [outcome] * 2
    lines = [(record.levelno, record.getMessage()) for record in caplog.records]
    assert lines == ([] if level is None else [(level, verdicts[0].reason)])


def test_the_first_run_is_reported_once() -> None:
    reported: list[Any] = []
    wait = wait_of(on_first_run=reported.append)
    wait.on_failed_poll(DifyConnectionError("away"))
    assert reported == []
    wait.on_poll(RUNNING)
    wait.on_poll(make_run("succeeded"))
    assert reported == [RUNNING]


def test_a_status_that_stays_has_a_sign_of_life_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.runs.waiting.LIFE_INTERVAL", 0.0)
    wait = wait_of()
    created = int(ago(100).timestamp())
    for steps, created_at in ((0, None), (3, None), (0, created), (3, created)):
        wait.on_poll(make_run("running", finished_at=None, created_at=created_at, total_steps=steps))
    beginning = f"Dify workflow run {RUN_ID} is running"
    first, with_steps, with_age, with_both = [record.getMessage() for record in caplog.records]
    assert first == f"{beginning}."
    assert with_steps == f"{beginning}, 3 steps so far."
    age = r", 10\d seconds after its creation"
    assert re.fullmatch(rf"{beginning}{age}\.", with_age)
    assert re.fullmatch(rf"{beginning}{age}, 3 steps so far\.", with_both)
    wait.on_poll(RUNNING)
    assert caplog.records[-1].getMessage() == f"{beginning}, as before."
    # Not before its time.
    monkeypatch.setattr("airflow_provider_dify.runs.waiting.LIFE_INTERVAL", 60.0)
    wait.on_poll(RUNNING)
    assert len(caplog.records) == 5
    wait._last_line = ago(60)
    wait.on_poll(RUNNING)
    wait.on_poll(RUNNING)
    assert len(caplog.records) == 6
    wait._last_line = ago(60)
    wait.on_poll(make_run("running", finished_at=None, created_at=int(ago(-50).timestamp())))
    assert ", 0 seconds after its creation" in caplog.records[-1].getMessage()


# --- polls that fail


def test_failures_in_a_row_end_the_wait_and_others_do_not(caplog: pytest.LogCaptureFixture) -> None:
    wait = wait_of(max_consecutive_failures=2)
    error = DifyConnectionError("the server is away")
    for _ in range(3):
        wait.on_failed_poll(error)
        wait.on_failed_poll(error)
        wait.on_poll(RUNNING)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings[:2] == [
        f"A poll of Dify workflow run {RUN_ID} failed, {number} in a row of at most 2: the server is away"
        for number in (1, 2)
    ]
    assert len(warnings) == 6
    wait.on_failed_poll(error)
    wait.on_failed_poll(error)
    with pytest.raises(DifyConnectionError) as caught:
        wait.on_failed_poll(error)
    assert caught.value is error


def test_failures_without_a_limit_are_counted_and_survived(caplog: pytest.LogCaptureFixture) -> None:
    wait = wait_of(max_consecutive_failures=None)
    for _ in range(50):
        wait.on_failed_poll(DifyConnectionError("away"))
    assert caplog.records[-1].getMessage() == f"A poll of Dify workflow run {RUN_ID} failed, 50 in a row: away"


def test_an_unknown_run_ends_the_wait_at_once_without_a_grace_period() -> None:
    error = DifyWorkflowRunNotFound("not known", workflow_run_id=RUN_ID)
    with pytest.raises(DifyWorkflowRunNotFound) as caught:
        wait_of().on_failed_poll(error)
    assert caught.value is error


def test_an_unknown_run_is_waited_for_during_its_grace_period(caplog: pytest.LogCaptureFixture) -> None:
    wait = wait_of(not_found_grace=60.0)
    error = DifyWorkflowRunNotFound("not known.", workflow_run_id=RUN_ID)
    wait.on_failed_poll(error)
    wait.on_failed_poll(error)
    assert [record.getMessage() for record in caplog.records] == [
        f"Dify does not know workflow run {RUN_ID} yet; polling it until 60 seconds after the first poll."
    ]
    assert "its last status was unknown to Dify, seen since 20" in wait.describe_last_status()
    over = wait_of(not_found_grace=60.0, first_poll=ago(61))
    with pytest.raises(DifyWorkflowRunNotFound) as caught:
        over.on_failed_poll(error)
    assert str(caught.value) == (
        "not known. It was still unknown 61 seconds after the first poll (not_found_grace is 60 seconds)."
    )
    assert caught.value.workflow_run_id == RUN_ID


def test_an_answer_that_the_run_is_unknown_is_no_failure_of_the_server() -> None:
    wait = wait_of(not_found_grace=60.0, max_consecutive_failures=1)
    for _ in range(3):
        wait.on_failed_poll(DifyConnectionError("away"))
        wait.on_failed_poll(DifyWorkflowRunNotFound("not known"))


def test_a_wait_that_ends_says_how_the_run_stood() -> None:
    wait = wait_of()
    assert wait.describe_last_status() == f"Dify workflow run {RUN_ID} was never seen: no poll succeeded."
    wait.on_poll(RUNNING)
    since = wait.status_since
    wait.on_poll(RUNNING)
    assert since is not None
    assert datetime.now(timezone.utc) - since < timedelta(seconds=10)
    assert wait.describe_last_status() == (
        f"Dify workflow run {RUN_ID} was not over: its last status was running, "
        f"seen since {since.isoformat(timespec='seconds')}."
    )


def test_a_wait_counts_its_grace_period_from_its_first_poll() -> None:
    wait = wait_of()
    first = wait.first_poll
    assert datetime.now(timezone.utc) - first < timedelta(seconds=10)
    assert wait.first_poll is first
    assert wait_of(first_poll=ago(9)).first_poll < first


# --- what comes back from the triggerer


def test_a_triggers_event_becomes_an_error_or_none() -> None:
    def timed_out(text: str) -> DifyError:
        return DifyError(f"timed out: {text}")

    def error_of(event: Any) -> Any:
        return error_from_event(event, timed_out)

    assert error_of({"end": "run_is_over", "message": "m"}) is None
    assert error_of("success") is None
    assert str(error_of({"end": "timed_out", "message": "m"})) == "timed out: m"
    given = error_of({"end": "failed", "message": "m", "error": DifyRequestError("e").to_event()})
    assert (type(given), str(given)) == (DifyRequestError, "e")
    bare = error_of({"end": "failed", "message": "m", "error": None})
    assert (type(bare), str(bare)) == (DifyError, "m")
    assert str(error_of({"message": "m"})) == "m"


def test_a_wait_survives_its_way_through_a_serialized_trigger() -> None:
    wait = TriggerWait(poll_interval=5.0, deadline=7.0, not_found_grace=3.0, run_timeout=4.0, max_wait=9.0)
    assert TriggerWait(**wait.serialize()) == wait


# --- how long to wait


@pytest.mark.parametrize(
    ("polls", "max_wait", "least", "most"),
    [(1, None, 5, 10), (2, None, 10, 20), (3, None, 20, 40), (5, None, 80, 160), (5, 100.0, 80, 100), (5, 7.0, 7, 7)],
)
def test_an_interval_doubles_from_poll_to_poll(polls: int, max_wait: float | None, least: float, most: float) -> None:
    wait = TriggerWait(poll_interval=10, exponential_backoff=True, max_wait=max_wait)
    intervals = [wait.interval_after(polls) for _ in range(200)]
    assert least <= min(intervals) <= max(intervals) <= most
    assert most == least or max(intervals) - min(intervals) > (most - least) / 2
    assert TriggerWait(poll_interval=10, max_wait=max_wait).interval_after(polls) == 10


def test_an_interval_is_bounded_however_many_polls_there_were() -> None:
    assert TriggerWait(poll_interval=1, exponential_backoff=True).interval_after(10_000) < 2.0**63 + 1


@pytest.mark.parametrize(("failures", "least", "most"), [(1, 2, 3), (2, 4, 6), (3, 8, 12), (6, 60, 60), (9999, 60, 60)])
def test_a_pause_after_failures_doubles_up_to_a_minute(failures: int, least: float, most: float) -> None:
    pauses = [delay_after(DifyConnectionError("away"), failures, 2.0) for _ in range(200)]
    assert least <= min(pauses) <= max(pauses) <= most
    assert most == least or max(pauses) - min(pauses) > (most - least) / 2


def test_a_pause_is_as_long_as_the_server_asks_at_least() -> None:
    assert delay_after(DifyConnectionError("busy", retry_after=500.0), 1, 1.0) == 500
    assert 1 <= delay_after(DifyConnectionError("busy", retry_after=0.5), 1, 1.0) <= 1.5
    assert delay_after(DifyConnectionError("away"), 1, 0.01) < 0.1
    assert delay_after(DifyWorkflowRunNotFound("not known"), 5, 1.0) == 0


def test_a_pause_ends_at_the_deadline() -> None:
    asyncio.run(asyncio.wait_for(Deadline.after(0.05).pause(3600.0), 40.0))
