"""How the log is read page by page, over a log that is sorted as Dify sorts it."""

from __future__ import annotations

import asyncio
import zlib
from typing import Any

import pendulum
import pytest
from hypothesis import strategies as st

from airflow_provider_dify.api.calls import Call, Client
from airflow_provider_dify.api.models import LoggedWorkflowRun, row_key
from airflow_provider_dify.runs.log import read_log
from tests.unit.fuzzing import fuzzed
from tests.unit.scripted_client import ScriptedClient

NOW = 1_800_000_000


def row(number: int, second: int) -> LoggedWorkflowRun:
    at = pendulum.from_timestamp(NOW + second)
    return LoggedWorkflowRun(f"run-{number}", "succeeded", "us", None, 1, 1, at, at, 1.0, logged_at=at)


class SortedLog:
    """
    A log that is sorted by whole seconds, the rows of one second in an order of its own on each page.

    :param seconds: the second of each row.
    :param filters_by_time: whether the server knows ``created_at__before``.
    """

    def __init__(self, seconds: list[int], *, filters_by_time: bool = True) -> None:
        self.rows = [row(number, second) for number, second in enumerate(seconds)]
        self.filters_by_time = filters_by_time
        self.requests: list[dict[str, Any]] = []

    async def perform(self, call: Call[Any]) -> Any:
        params: Any = call.params
        self.requests.append(params)
        assert len(self.requests) < 100
        before = params.get("created_at__before") if self.filters_by_time else None
        found = [row for row in self.rows if before is None or str(row.logged_at.isoformat()) <= before]  # type: ignore[union-attr]
        number, limit = params["page"], params["limit"]
        shuffled = sorted(found, key=lambda row: zlib.crc32(f"{row.workflow_run_id} {number} {limit}".encode()))
        shuffled.sort(key=lambda row: row.logged_at.timestamp(), reverse=True)  # type: ignore[union-attr]
        return shuffled[(number - 1) * limit : number * limit]

    def read(self, size: int = 20) -> list[str]:
        """Return the ids of the rows that a reader of the whole log gets."""
        return asyncio.run(ids_in(self, size))


async def ids_in(client: Client, size: int) -> list[str]:
    return [row_key(row) async for rows in read_log(client, size=size) for row in rows]


@fuzzed(st.lists(st.integers(0, 30), max_size=200), st.sampled_from([2, 7, 20, 100]), short=50, full=200)
def test_no_row_is_missed_where_many_are_of_one_second(seconds: list[int], size: int) -> None:
    log = SortedLog([second for second in seconds if seconds.count(second) <= 100])
    assert len(log.read(size)) == len(log.rows)


def test_a_second_with_more_rows_than_a_page_is_read_in_one_request() -> None:
    log = SortedLog([5] * 3 + [4] * 90 + [3] * 30)
    assert len(log.read()) == 123
    assert [request["limit"] for request in log.requests] == [20, 20, 100, 20, 100]


def test_a_server_that_knows_no_filter_by_time_is_read_by_the_pages_numbers() -> None:
    log = SortedLog(list(range(90)), filters_by_time=False)
    assert len(log.read()) == 90
    assert [request["page"] for request in log.requests] == [1, 1, 2, 3, 4, 5]


def test_rows_that_tell_no_time_are_read_by_the_pages_numbers() -> None:
    rows = [LoggedWorkflowRun(name, "succeeded", None, None, None, None, None, None, None) for name in "abc"]
    client = ScriptedClient(lambda call: rows[call.params["page"] - 1 :][:1])  # type: ignore[index]
    assert asyncio.run(ids_in(client, 1)) == ["a", "b", "c"]
    assert [call.params for call in client.taken] == [{"page": page, "limit": 1} for page in (1, 2, 3, 4)]


@pytest.mark.parametrize("rows", [0, 19])
def test_a_page_that_is_not_full_is_the_last_one(rows: int) -> None:
    log = SortedLog(list(range(rows)))
    assert len(log.read()) == rows
    assert len(log.requests) == 1


def test_a_server_that_shows_the_same_page_for_ever_is_not_read_for_ever() -> None:
    rows = [row(number, 0) for number in range(100)]
    client = ScriptedClient(lambda call: rows)
    assert len(asyncio.run(ids_in(client, 100))) == 100
    assert len(client.taken) == 4
