"""How a look into Dify's log is repeated."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_dify.api.calls import Pause
from airflow_provider_dify.exceptions import DifyConnectionError, DifyRequestError
from airflow_provider_dify.runs.clock import TaskClock
from airflow_provider_dify.runs.log import RepeatedLook

AWAY = DifyConnectionError("Dify is away")

pytestmark = pytest.mark.usefixtures("quick_retries")


class Looks:
    """Looks with these results in turn, of which the last one stays; an error is raised."""

    def __init__(self, *results: Any) -> None:
        self._results = results
        self.number = 0

    def __call__(self) -> Any:
        result = self._results[min(self.number, len(self._results) - 1)]
        self.number += 1
        if isinstance(result, Exception):
            raise result
        yield from ()
        return result


def play(steps: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[float]]:
    """Take steps at once, as if each pause were over; return what they return, and the pauses."""
    passed = [0.0]
    monkeypatch.setattr("airflow_provider_dify.runs.clock.time.monotonic", lambda: passed[0])
    pauses: list[float] = []
    try:
        while True:
            step = next(steps)
            assert isinstance(step, Pause)
            passed[0] += step.seconds
            pauses.append(step.seconds)
    except StopIteration as done:
        return done.value, pauses


def repeated(poll_interval: float = 10.0, seconds: float = 3600.0) -> RepeatedLook:
    return RepeatedLook(TaskClock(time.time() + seconds, math.inf), logging.getLogger(__name__), poll_interval)


@pytest.mark.parametrize(("failures", "is_read"), [(0, True), (2, True), (3, False)])
def test_a_log_that_can_not_be_read_is_asked_for_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failures: int, is_read: bool
) -> None:
    look = Looks(*[AWAY] * failures, "read")
    steps = repeated().through_failures(look, 2)
    if is_read:
        found, pauses = play(steps, monkeypatch)
        assert (found, pauses) == ("read", [10.0] * failures)
        assert caplog.text.count("in a row of at most 2: Dify is away") == failures
    else:
        with pytest.raises(DifyConnectionError, match="Dify is away"):
            play(steps, monkeypatch)
    assert look.number == min(failures + 1, 3)


def test_a_log_that_can_not_be_read_until_the_deadline_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Looks(AWAY)
    with pytest.raises(DifyConnectionError):
        play(repeated(seconds=0).through_failures(look, 100), monkeypatch)
    assert look.number == 1


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    busy = DifyConnectionError("busy", retry_after=50.0)
    assert play(repeated().through_failures(Looks(busy, "read"), 2), monkeypatch) == ("read", [50.0])


@pytest.mark.parametrize(
    ("poll_interval", "pauses"), [(10.0, [1, 2, 4, 8, 10, 10]), (0.25, [0.25, 0.5, 1, 1]), (1.0, [1, 1])]
)
def test_a_run_is_looked_for_often_at_first_and_then_as_often_as_it_is_polled(
    monkeypatch: pytest.MonkeyPatch, poll_interval: float, pauses: list[float]
) -> None:
    look = Looks(*[None] * len(pauses), "run")
    assert play(repeated(poll_interval).until_found(look, lambda has_failed: 99.0), monkeypatch) == ("run", pauses)


def test_the_last_look_is_at_the_end_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    left: Iterator[float] = iter([2.5, 1.5, 0.0])
    look = Looks(None)
    assert play(repeated().until_found(look, lambda has_failed: next(left)), monkeypatch) == (None, [1.0, 1.5])
    assert look.number == 3


def test_a_look_that_failed_is_not_taken_for_one_that_found_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    look = Looks(AWAY, AWAY, None)
    found, pauses = play(repeated().until_found(look, lambda has_failed: math.inf if has_failed else 0), monkeypatch)
    assert (found, pauses, look.number) == (None, [1.0, 2.0], 3)
    assert caplog.text.count("looking again: Dify is away") == 2


def test_what_does_not_pass_ends_the_look(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DifyRequestError):
        play(repeated().until_found(Looks(DifyRequestError("refused")), lambda has_failed: 99.0), monkeypatch)


def test_no_look_comes_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Looks(None)
    assert play(repeated(seconds=0).until_found(look, lambda has_failed: math.inf), monkeypatch) == (None, [])
    assert look.number == 1
