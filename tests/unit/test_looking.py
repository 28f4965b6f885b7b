"""How a look into Dify's log is repeated."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_provider_dify.exceptions import DifyConnectionError, DifyRequestError
from airflow_provider_dify.runs.log import until
from airflow_provider_dify.runs.waiting import Deadline

AWAY = DifyConnectionError("Dify is away")

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were asked for, each over at once."""
    asked: list[float] = []

    async def pause(seconds: float) -> None:
        asked.append(seconds)

    monkeypatch.setattr("airflow_provider_dify.runs.log.asyncio.sleep", pause)
    return asked


class Looks:
    """Looks with these results in turn, of which the last one stays; an error is raised."""

    def __init__(self, *results: Any) -> None:
        self._results = results
        self.number = 0
        # The failures in a row, as they were reported.
        self.failures: list[int] = []

    async def __call__(self) -> Any:
        result = self._results[min(self.number, len(self._results) - 1)]
        self.number += 1
        if isinstance(result, Exception):
            raise result
        return result

    def repeat(self, interval: float = 10.0, seconds: float = 3600.0, most: int = 100, **arguments: Any) -> Any:
        """Repeat the look, through so many failures in a row at most."""

        def on_failure(error: DifyConnectionError, failures: int) -> None:
            self.failures.append(failures)
            if failures > most:
                raise error

        return asyncio.run(until(self, Deadline.after(seconds), on_failure, interval_seconds=interval, **arguments))


@pytest.mark.parametrize(("failures", "is_read"), [(0, True), (2, True), (3, False)])
def test_a_log_that_can_not_be_read_is_asked_for_again(pauses: list[float], failures: int, is_read: bool) -> None:
    look = Looks(*[AWAY] * failures, "read")
    if is_read:
        assert look.repeat(most=2, first_seconds=10.0) == "read"
        assert pauses == [10.0] * failures
    else:
        with pytest.raises(DifyConnectionError, match="Dify is away"):
            look.repeat(most=2, first_seconds=10.0)
    assert look.failures == list(range(1, failures + 1))
    assert look.number == min(failures + 1, 3)


def test_failures_are_counted_in_a_row(pauses: list[float]) -> None:
    look = Looks(AWAY, AWAY, None, AWAY, "read")
    assert look.repeat(most=2) == "read"
    assert look.failures == [1, 2, 1]


def test_a_log_that_can_not_be_read_until_the_deadline_brings_nothing(pauses: list[float]) -> None:
    look = Looks(AWAY)
    assert look.repeat(seconds=0) is None
    assert (look.number, look.failures, pauses) == (1, [1], [])


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks(pauses: list[float]) -> None:
    busy = DifyConnectionError("busy", retry_after=50.0)
    assert Looks(busy, "read").repeat() == "read"
    assert pauses == [50.0]


@pytest.mark.parametrize(
    ("poll_interval", "expected"), [(10.0, [1, 2, 4, 8, 10, 10]), (0.25, [0.25, 0.5, 1, 1]), (1.0, [1, 1])]
)
def test_a_run_is_looked_for_often_at_first_and_then_as_often_as_it_is_polled(
    pauses: list[float], poll_interval: float, expected: list[float]
) -> None:
    look = Looks(*[None] * len(expected), "run")
    assert look.repeat(poll_interval, seconds_left=lambda has_failed: 99.0) == "run"
    assert pauses == expected


def test_the_last_look_is_at_the_end_of_the_time(pauses: list[float]) -> None:
    left: Iterator[float] = iter([2.5, 1.5, 0.0])
    look = Looks(None)
    assert look.repeat(seconds_left=lambda has_failed: next(left)) is None
    assert (pauses, look.number) == ([1.0, 1.5], 3)


def test_a_look_that_failed_is_not_taken_for_one_that_found_nothing(pauses: list[float]) -> None:
    look = Looks(AWAY, AWAY, None)
    assert look.repeat(seconds_left=lambda has_failed: math.inf if has_failed else 0) is None
    assert (pauses, look.number, look.failures) == ([1.0, 2.0], 3, [1, 2])


def test_what_does_not_pass_ends_the_look(pauses: list[float]) -> None:
    with pytest.raises(DifyRequestError):
        Looks(DifyRequestError("refused")).repeat()


def test_no_look_comes_after_the_deadline(pauses: list[float]) -> None:
    look = Looks(None)
    assert look.repeat(seconds=0, seconds_left=lambda has_failed: math.inf) is None
    assert (pauses, look.number) == ([], 1)
