"""How a batch ends before its rows are over: what is started after a kill, and what is written."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_dify.batch.row import BatchSettings
from airflow_provider_dify.batch.running import BatchTask
from airflow_provider_dify.exceptions import DifyError, DifyTaskKilled
from airflow_provider_dify.hooks.dify import DifyHook
from tests.dify_stand_in import DifyStandIn, Start, respond, stall
from tests.unit.test_batch_resuming import ti_of
from tests.unit.test_batch_task import SETTINGS, WAIT, lines_of, numbered

if TYPE_CHECKING:
    from aiohttp import web

pytestmark = pytest.mark.usefixtures("dify_connection")

# Seconds that a row pauses before it starts something, in these tests.
PAUSE = 0.5


class RunningBatch:
    """A try of a batch in a thread, as Airflow runs a task, which can be killed."""

    def __init__(
        self,
        inputs: Any,
        output: Path | None = None,
        *,
        settings: BatchSettings = SETTINGS,
        active: int = 4,
        max_failed_runs: float = 0,
        try_number: int = 1,
        max_tries: int = 1,
    ) -> None:
        settings = replace(
            settings,
            inputs=inputs,
            max_active_runs=active,
            output_path=None if output is None else str(output),
            max_failed_runs=max_failed_runs,
            retries=max_tries,
        )
        context: Any = {"ti": ti_of(try_number=try_number, max_tries=max_tries)}
        self.task = BatchTask(settings, context, DifyHook(), logging.getLogger("batch"), lambda summary: None)
        self.returned: Any = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> RunningBatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self.returned = self.task.run(lambda app_id: None)
        except DifyError as error:
            self.error = error

    def kill(self) -> None:
        self.task.kill()


def wait_until(is_met: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not is_met():
        assert time.monotonic() < until
        time.sleep(0.005)


def posts(dify: DifyStandIn) -> list[float]:
    """Return when starts arrived, whatever became of them."""
    return [seen.at for seen in dify.requests if seen.method == "POST" and seen.path.endswith("/run")]


# --- after a kill


@pytest.fixture
def slow_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_dify.runs.following.RETRY_DELAY", PAUSE)
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", PAUSE)
    monkeypatch.setattr("airflow_provider_dify.batch.slots.FIRST_PAUSE", PAUSE)


@pytest.mark.usefixtures("slow_pauses")
@pytest.mark.parametrize(
    ("pause", "said"),
    [
        ("not reached", "The start did not reach Dify"),
        ("failed", "is started again"),
        ("refused", "Dify has too many active runs"),
        ("lost", "It was not asked again"),
    ],
)
def test_a_batch_that_is_killed_starts_nothing_from_any_pause(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, tmp_path: Path, pause: str, said: str
) -> None:
    async def take(request: web.Request) -> web.StreamResponse:
        return await dify.respond_to(request)

    caplog.set_level(logging.INFO)
    # One run goes on, and its stop takes a while.
    dify.starts += [
        Start(duration=60),
        *[Start("run_streaming_failed" if pause == "failed" else "run_streaming_echo")] * 40,
    ]
    dify.misbehave_always(stall(1.2), "POST .*/stop")
    if pause == "refused":
        dify.active_runs_limit = 1
    elif pause == "lost":
        dify.misbehave(take, *[respond(502)] * 40, only="POST .*/run")
    away = dify.refusing_connections() if pause == "not reached" else nullcontext()
    settings = replace(SETTINGS, run_retries=3, wait=replace(WAIT, not_found_grace=PAUSE))
    with RunningBatch(
        numbered(41), tmp_path / "results.jsonl", settings=settings, active=5, max_failed_runs=40
    ) as batch:
        wait_until(lambda: len(dify.started) >= 1)
        with away:
            wait_until(lambda: any(said in record.getMessage() for record in list(caplog.records)))
            time.sleep(PAUSE / 5)
        dify.active_runs_limit = None
        before = len(posts(dify))
        batch.kill()
    time.sleep(2 * PAUSE)
    assert before < 41
    assert len(posts(dify)) == before
    assert isinstance(batch.error, DifyTaskKilled)


class SlowRows(list[Any]):
    """Rows of which one takes a while to be read, as from a slow storage."""

    def __init__(self, count: int, slow: int) -> None:
        super().__init__(numbered(count))
        self.slow = slow
        self.is_read = threading.Event()
        self.may_go_on = threading.Event()

    def __iter__(self) -> Iterator[Any]:
        for index, row in enumerate(super().__iter__()):
            if index == self.slow:
                self.is_read.set()
                self.may_go_on.wait(20)
            yield row


def test_a_row_that_is_read_while_the_batch_is_killed_is_not_started(dify: DifyStandIn, tmp_path: Path) -> None:
    rows = SlowRows(300, 150)
    with RunningBatch(rows, tmp_path / "results.jsonl") as batch:
        rows.is_read.wait(20)
        wait_until(lambda: len(posts(dify)) == 100)
        killing = threading.Thread(target=batch.kill)
        killing.start()
        time.sleep(0.1)
        rows.may_go_on.set()
        killing.join()
    assert len(posts(dify)) == 100


def test_a_batch_that_is_killed_at_full_speed_starts_nothing_more(dify: DifyStandIn, tmp_path: Path) -> None:
    dify.run_duration = 0.01
    with RunningBatch(numbered(5000), tmp_path / "results.jsonl", active=50) as batch:
        wait_until(lambda: len(posts(dify)) >= 300)
        killed_at = time.monotonic()
        batch.kill()
    # What had a connection at that moment goes out.
    assert [at for at in posts(dify) if at > killed_at + 0.5] == []
    assert len(posts(dify)) < 2000


# --- what is written at the end


def test_the_last_try_that_is_killed_writes_the_results_that_are_there(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    dify.starts += [Start(), Start(), Start(duration=60), Start(duration=60)]
    with RunningBatch(numbered(6), output, active=2, max_tries=0) as batch:
        wait_until(lambda: len(dify.started) == 4)
        batch.kill()
    assert isinstance(batch.error, DifyTaskKilled)
    assert [(row["index"], row["status"]) for row in lines_of(output)] == [(0, "succeeded"), (1, "succeeded")]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_a_try_that_is_killed_before_the_last_leaves_its_results_to_the_retry(
    dify: DifyStandIn, tmp_path: Path
) -> None:
    output = tmp_path / "results.jsonl"
    dify.starts += [Start(), Start(), Start(duration=60), Start(duration=60)]
    with RunningBatch(numbered(6), output, active=2) as batch:
        wait_until(lambda: len(dify.started) == 4)
        batch.kill()
    assert not output.exists()
    with RunningBatch(numbered(6), output, active=2, try_number=2) as batch:
        pass
    assert batch.error is None
    assert [row["index"] for row in lines_of(output)] == list(range(6))
    assert len(dify.started) == 8
    assert json.loads(output.read_text().splitlines()[0])["status"] == "succeeded"


def test_parts_stay_where_the_file_can_not_be_written(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    dify.starts += [Start(), Start(duration=60)]
    with RunningBatch(numbered(3), output, active=1, max_tries=0) as batch:
        wait_until(lambda: len(dify.started) == 2)
        output.mkdir()
        batch.kill()
    assert isinstance(batch.error, DifyTaskKilled)
    assert "succeeded" in "".join(path.read_text() for path in tmp_path.glob("*.parts/*/*-*"))


# --- rows whose start got lost


@pytest.mark.parametrize("when", ["other rows go on", "looked for once more"])
def test_the_retry_of_a_batch_that_was_killed_sends_no_lost_start_again(
    dify: DifyStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    output = tmp_path / "results.jsonl"
    settings = replace(SETTINGS, wait=replace(WAIT, not_found_grace=0.1))
    has_others = when == "other rows go on"
    rows = numbered(4 if has_others else 1)

    def is_lost() -> bool:
        return any("shows no run of its start" in record.getMessage() for record in list(caplog.records))

    async def look_slowly(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(1 if is_lost() else 0)
        return await dify.respond_to(request)

    dify.misbehave_always(look_slowly, "GET .*/logs")
    dify.misbehave(respond(502), only="POST .*/run")
    dify.run_duration = 60
    with RunningBatch(
        rows, output, settings=settings if has_others else SETTINGS, active=2, max_failed_runs=1
    ) as batch:
        wait_until(is_lost)
        batch.kill()
    assert isinstance(batch.error, DifyTaskKilled)
    dify.run_duration = 0
    dify.misbehave_always(None)
    before = len(posts(dify))
    with RunningBatch(rows, output, settings=settings, active=2, max_failed_runs=1, try_number=2) as batch:
        pass
    assert batch.error is None
    results = lines_of(output)
    assert [result["status"] for result in results] == ["failed", *["succeeded"] * (len(rows) - 1)]
    assert "it may still run, and be paid for" in results[0]["error"]
    assert len(posts(dify)) - before == len(rows) - 1
