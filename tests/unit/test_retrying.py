"""How often, and how far apart, a request is sent again."""

from __future__ import annotations

import logging
import time
from typing import Any

import pytest

from airflow_provider_dify.api.session import RequestRetries
from airflow_provider_dify.exceptions import DifyConnectionError, DifyRequestError


@pytest.mark.parametrize(
    ("retry_after", "attempt", "least", "most"),
    [(None, 1, 1.0, 2.0), (None, 3, 4.0, 5.0), (None, 30, 60.0, 60.0), (7.0, 1, 7.0, 8.0), (60.0, 1, 60.0, 60.0)],
)
def test_a_retry_waits_for_its_turn_and_for_what_the_server_asks(
    monkeypatch: pytest.MonkeyPatch, retry_after: float | None, attempt: int, least: float, most: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("airflow_provider_dify.api.session.time.sleep", pauses.append)

    def work() -> None:
        raise DifyConnectionError("busy", retry_after=retry_after)

    for _ in range(50):
        with pytest.raises(DifyConnectionError):
            RequestRetries(attempt, 1.0, None, logging.getLogger()).call(work)  # type: ignore[arg-type]
    waits = pauses[attempt - 1 :: attempt]
    assert least <= min(waits) <= max(waits) <= most
    if least < most:
        # With jitter, so that many tasks don't come back together.
        assert max(waits) - min(waits) > 0.2


def test_the_log_says_which_attempt_failed_and_why(caplog: pytest.LogCaptureFixture) -> None:
    results: list[Any] = [DifyConnectionError("busy"), DifyConnectionError("still busy"), "done"]

    def work() -> str:
        result = results.pop(0)
        if isinstance(result, Exception):
            raise result
        return str(result)

    retries = RequestRetries(3, 0.001, None, logging.getLogger("of a task"))  # type: ignore[arg-type]
    assert retries.call(work) == "done"
    assert [record.getMessage().partition(", the")[0] for record in caplog.records] == [
        "Attempt 1 of 4 failed",
        "Attempt 2 of 4 failed",
    ]
    assert [record.getMessage().rpartition(": ")[2] for record in caplog.records] == ["busy", "still busy"]


@pytest.mark.parametrize(
    ("error", "attempts"),
    [
        (DifyConnectionError("busy"), 3),
        (DifyConnectionError("busy", retry_after=61.0), 1),
        (DifyRequestError("rejected"), 1),
    ],
)
def test_only_what_may_pass_soon_is_asked_again(error: Exception, attempts: int) -> None:
    made = []

    def work() -> None:
        made.append(1)
        raise error

    retries = RequestRetries(2, 0.001, None, logging.getLogger())  # type: ignore[arg-type]
    with pytest.raises(type(error)):
        retries.call(work)
    assert len(made) == attempts


@pytest.mark.parametrize(("seconds", "attempts"), [(0.5, 1), (60.0, 3)])
def test_nothing_is_sent_again_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch, seconds: float, attempts: int
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("airflow_provider_dify.api.session.time.sleep", pauses.append)
    retries = RequestRetries(2, 1.0, time.time() + seconds, logging.getLogger())  # type: ignore[arg-type]
    made = []

    def work() -> None:
        made.append(1)
        raise DifyConnectionError("busy")

    with pytest.raises(DifyConnectionError):
        retries.call(work)
    assert len(made) == attempts
    # The pauses are those that the retries ask for.
    assert all(pause >= 1.0 for pause in pauses)
    assert len(pauses) == attempts - 1
