"""How a batch ends before its rows are over: what is started after a kill, and what is written."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from airflow_provider_dify.exceptions import DifyError, DifyTaskKilled
from tests.dify_stand_in import DifyStandIn, Start, respond, stall
from tests.unit.batches import lines_of, numbered, settings_for, task_of

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
        active: int = 4,
        try_number: int = 1,
        max_tries: int = 1,
        **settings: Any,
    ) -> None:
        chosen = settings_for(inputs, output, max_active_runs=active, retries=max_tries, **settings)
        self.task = task_of(chosen, try_number=try_number, max_tries=max_tries)
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
            self.task.run(lambda app_id: None)
        except DifyError as error:
            self.error = error

    def kill(self) -> None:
        self.task.kill()


def wait_until(is_met: Callable[[], bool]) -> None:
    until = time.monotonic() + 60
    while not is_met():
        assert time.monotonic() < until
        time.sleep(0.005)


def posts(dify: DifyStandIn) -> list[float]:
    """Return when starts arrived, whatever became of them."""
    return [seen.at for seen in dify.requests if seen.method == "POST" and seen.path.endswith("/run")]


def posts_after_the_stop(dify: DifyStandIn) -> int:
    """Return how many starts arrived after the first stop, with which a batch that is killed begins its end."""
    stopped_at = min(seen.at for seen in dify.requests if seen.path.endswith("/stop"))
    return sum(at > stopped_at for at in posts(dify))


# --- after a kill


@pytest.fixture
def slow_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_provider_dify.runs.following.RETRY_DELAY", PAUSE)
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", PAUSE)
    monkeypatch.setattr("airflow_provider_dify.batch.slots.FIRST_PAUSE", PAUSE)
    # For a stop that Dify does not answer in time, and that is sent again until then.
    monkeypatch.setattr("airflow_provider_dify.batch.running._SECONDS_TO_STOP", 3 * PAUSE)


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
    # One run goes on, and its stop takes longer than each pause.
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
    with RunningBatch(
        numbered(41),
        tmp_path / "results.jsonl",
        active=5,
        max_failed_runs=40,
        run_retries=3,
        not_found_grace=PAUSE,
    ) as batch:
        wait_until(lambda: len(dify.started) >= 1)
        with away:
            wait_until(lambda: any(said in record.getMessage() for record in list(caplog.records)))
            time.sleep(PAUSE / 5)
            dify.active_runs_limit = None
            before = len(posts(dify))
            batch.kill()
    if pause == "not reached":
        # Each connection was lost, and with it the run that could be stopped.
        assert len(posts(dify)) == before
    else:
        assert posts_after_the_stop(dify) == 0
    assert len(posts(dify)) < 41
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
                self.may_go_on.wait(60)
            yield row


def test_a_row_that_is_read_while_the_batch_is_killed_is_not_started(dify: DifyStandIn, tmp_path: Path) -> None:
    rows = SlowRows(300, 150)
    with RunningBatch(rows, tmp_path / "results.jsonl") as batch:
        wait_until(lambda: rows.is_read.is_set() and len(posts(dify)) == 100)
        batch.kill()
        rows.may_go_on.set()
    assert len(posts(dify)) == 100


def test_a_batch_that_is_killed_at_full_speed_starts_nothing_more(dify: DifyStandIn, tmp_path: Path) -> None:
    dify.run_duration = 0.01
    # These are stopped, after all the others that could have been started.
    dify.starts += [Start(duration=60)] * 2
    with RunningBatch(numbered(5000), tmp_path / "results.jsonl", active=50) as batch:
        wait_until(lambda: len(posts(dify)) >= 300)
        batch.kill()
    # What had a connection at that moment goes out.
    assert posts_after_the_stop(dify) <= 50
    assert len(posts(dify)) < 5000


# --- what is written at the end


@pytest.mark.parametrize("is_last", [True, False])
def test_a_try_that_is_killed_leaves_its_results_to_the_retry_or_writes_them_if_it_is_the_last(
    dify: DifyStandIn, tmp_path: Path, is_last: bool
) -> None:
    output = tmp_path / "results.jsonl"
    dify.starts += [Start(), Start(), Start(duration=60), Start(duration=60)]
    with RunningBatch(numbered(6), output, active=2, max_tries=0 if is_last else 1) as batch:
        wait_until(lambda: len(dify.started) == 4)
        batch.kill()
    assert isinstance(batch.error, DifyTaskKilled)
    if is_last:
        assert [(row["index"], row["status"]) for row in lines_of(output)] == [(0, "succeeded"), (1, "succeeded")]
        assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
        return
    assert not output.exists()
    with RunningBatch(numbered(6), output, active=2, try_number=2) as batch:
        pass
    assert batch.error is None
    assert [(row["index"], row["status"]) for row in lines_of(output)] == [(n, "succeeded") for n in range(6)]
    assert len(dify.started) == 8


def test_parts_stay_where_the_file_can_not_be_written_and_a_stop_that_fails_is_a_warning(
    dify: DifyStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.runs.stopping._PAUSE", 0.01)
    output = tmp_path / "results.jsonl"
    dify.starts += [Start(), Start(duration=60)]
    dify.misbehave_always(respond(500), "POST .*/stop")
    with RunningBatch(numbered(3), output, active=1, max_tries=0) as batch:
        wait_until(lambda: len(dify.started) == 2)
        output.mkdir()
        batch.kill()
    assert isinstance(batch.error, DifyTaskKilled)
    assert "succeeded" in "".join(path.read_text() for path in tmp_path.glob("*.parts/*/*-*"))
    assert f"Workflow run {dify.started[1].workflow_run_id} could not be stopped and goes on" in caplog.text


# --- rows whose start got lost


@pytest.mark.parametrize("when", ["other rows go on", "looked for once more"])
def test_the_retry_of_a_batch_that_was_killed_sends_no_lost_start_again(
    dify: DifyStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture, when: str
) -> None:
    output = tmp_path / "results.jsonl"
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
    grace = 0.1 if has_others else 0.2
    with RunningBatch(rows, output, active=2, max_failed_runs=1, not_found_grace=grace) as batch:
        wait_until(is_lost)
        batch.kill()
    assert isinstance(batch.error, DifyTaskKilled)
    dify.run_duration = 0
    dify.misbehave_always(None)
    before = len(posts(dify))
    with RunningBatch(rows, output, active=2, max_failed_runs=1, not_found_grace=0.1, try_number=2) as batch:
        pass
    assert batch.error is None
    results = lines_of(output)
    assert [result["status"] for result in results] == ["failed", *["succeeded"] * (len(rows) - 1)]
    assert "it may still run, and be paid for" in results[0]["error"]
    assert len(posts(dify)) - before == len(rows) - 1
