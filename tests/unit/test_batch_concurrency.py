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


def test_refusals_of_one_burst_halve_once() -> None:
    limit = RunLimit(50)
    assert [limit.on_refused(sent_at=at, now=1) for at in (0.1, 0.2, 0.3)] == [True, False, False]
    assert limit.limit == 25


def test_there_is_always_room_for_one_run() -> None:
    limit = RunLimit(3)
    for at in range(0, 1000, 100):
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


def test_what_the_server_asks_to_wait_is_never_cut_short() -> None:
    limit = RunLimit(8)
    limit.on_refused(sent_at=0, now=0, retry_after=300)
    assert not limit.may_start(0, 299)
    assert limit.may_start(0, 300)


def test_the_limit_grows_by_one_at_a_time_while_it_is_in_use() -> None:
    limit = RunLimit(8)
    limit.on_refused(sent_at=0, now=0)
    assert not limit.may_start(4, GROWTH_INTERVAL - 1)
    assert limit.seconds_until_change(4, GROWTH_INTERVAL - 1) == pytest.approx(1)
    assert limit.may_start(4, GROWTH_INTERVAL)
    assert limit.limit == 5
    assert not limit.may_start(5, GROWTH_INTERVAL + 1)


def test_the_limit_does_not_grow_while_more_runs_than_it_are_active() -> None:
    limit = RunLimit(8)
    limit.on_refused(sent_at=0, now=0)
    assert not limit.may_start(8, 1000)
    assert limit.limit == 4


def test_the_limit_never_grows_beyond_what_was_asked_for() -> None:
    limit = RunLimit(4)
    limit.on_refused(sent_at=0, now=0)
    for now in range(20, 1000, 20):
        limit.may_start(limit.limit, now)
    assert limit.limit == 4
