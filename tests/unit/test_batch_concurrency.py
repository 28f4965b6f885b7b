"""How many runs a batch has at once."""

from __future__ import annotations

import pytest

from airflow_provider_dify.batch.slots import GROWTH_INTERVAL, MAX_PAUSE, RunLimit


def test_runs_start_up_to_the_limit_and_again_when_one_ends() -> None:
    limit = RunLimit(8)
    assert limit.may_start(7, 0)
    assert not limit.may_start(8, 0)
    assert limit.seconds_until_change(8, 0) is None
    assert limit.seconds_until_change(7, 0) == 0


def test_a_refusal_halves_the_runs_at_once_and_pauses_starts() -> None:
    limit = RunLimit(8)
    assert limit.on_refused(sent_at=0, now=1)
    assert limit.limit == 4
    assert not limit.may_start(0, 1)
    assert limit.seconds_until_change(0, 1) == 1
    assert limit.may_start(3, 2)
    assert not limit.may_start(5, 2)
    # Refusals of one burst halve once.
    assert [limit.on_refused(sent_at=at, now=20) for at in (19.1, 19.2, 19.3)] == [True, False, False]
    assert limit.limit == 2
    # There is always room for one run.
    for at in range(100, 1000, 100):
        limit.on_refused(sent_at=at, now=at + 1)
    assert limit.limit == 1
    assert limit.may_start(0, 2000)


def test_pauses_double_up_to_a_minute_until_a_start_is_taken() -> None:
    limit = RunLimit(8)
    pauses = []
    now = 0.0
    for _ in range(10):
        limit.on_refused(sent_at=now, now=now)
        pauses.append(limit.seconds_until_change(0, now) or 0)
        now += pauses[-1]
    assert pauses[:4] == [1, 2, 4, 8]
    assert pauses[-1] == MAX_PAUSE
    limit.on_started()
    limit.on_refused(sent_at=now, now=now)
    assert limit.seconds_until_change(0, now) == 1
    # What the server asks for is never cut short.
    limit.on_refused(sent_at=now, now=now, retry_after=300)
    assert not limit.may_start(0, now + 299)
    assert limit.may_start(0, now + 300)


def test_the_limit_grows_by_one_at_a_time_while_it_is_in_use() -> None:
    limit = RunLimit(8)
    limit.on_refused(sent_at=0, now=0)
    # Not while more runs than it are active.
    assert not limit.may_start(8, 2 * GROWTH_INTERVAL)
    assert limit.limit == 4
    limit = RunLimit(8)
    limit.on_refused(sent_at=0, now=0)
    assert not limit.may_start(4, GROWTH_INTERVAL - 1)
    assert limit.seconds_until_change(4, GROWTH_INTERVAL - 1) == pytest.approx(1)
    assert limit.may_start(4, GROWTH_INTERVAL)
    assert limit.limit == 5
    assert not limit.may_start(5, GROWTH_INTERVAL + 1)


def test_the_limit_never_grows_beyond_what_was_asked_for() -> None:
    limit = RunLimit(4)
    limit.on_refused(sent_at=0, now=0)
    for now in range(20, 1000, 20):
        limit.may_start(limit.limit, now)
    assert limit.limit == 4
