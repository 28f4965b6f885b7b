"""A batch as a task's try, over real HTTP: what becomes of its files when something is wrong with them."""

from __future__ import annotations

import os
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest

from airflow_provider_dify.batch import results
from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.output import ResultFiles
from airflow_provider_dify.batch.results import Checkpoint, Part, RowResult
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyConnectionError, DifyError, DifyOutputsError
from tests.combinations import pairs
from tests.dify_stand_in import DifyStandIn, Start, form_field, respond
from tests.unit.batches import lines_of, numbered, settings_for, task_of, ti_of

if TYPE_CHECKING:
    from aiohttp import web

pytestmark = pytest.mark.usefixtures("dify_connection")

ROWS = 40


def run_try(
    inputs: Any,
    output_path: Any = None,
    *,
    try_number: int = 1,
    max_tries: int = 1,
    at_end: Callable[[], object] = lambda: None,
    **settings: Any,
) -> Any:
    """Run a try of a batch; when its runs are over, and before their results are merged, do something."""
    summaries: list[dict[str, Any]] = []

    def push(summary: dict[str, Any]) -> None:
        summaries.append(summary)
        if len(summaries) == 2:
            at_end()

    task = task_of(settings_for(inputs, output_path, **settings), push, try_number=try_number, max_tries=max_tries)
    return task.run(lambda app_id: None)


def rows_started(dify: DifyStandIn) -> list[int]:
    return sorted(started.inputs["n"] for started in dify.started)


def parts_with_rows(output: Path) -> list[Path]:
    return sorted(path for path in Path(f"{output}.parts").glob("*/*-*") if '"index"' in path.read_text())


def cut(part: Path) -> None:
    os.truncate(part, part.stat().st_size // 2)


@pytest.mark.parametrize(
    ("which", "damage"), pairs([0, 1, -1], [pytest.param(Path.unlink, id="removed"), pytest.param(cut, id="cut")])
)
def test_a_part_that_is_gone_fails_the_try_and_the_retry_reads_its_rows_from_the_log(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], which: int
) -> None:
    # Many parts: a later one says that what came before is written.
    monkeypatch.setattr(results, "PART_SECONDS", 0.0)
    dify.run_duration = 0.05
    output = tmp_path / "results.jsonl"
    with pytest.raises(DifyError, match="results are missing") as failure:
        run_try(numbered(ROWS), output, at_end=lambda: damage(parts_with_rows(output)[which]))
    # A retry is worth it.
    assert type(failure.value) is DifyError
    left = len(lines_of(output))
    assert 0 < left < ROWS
    assert f"{ROWS - left} of {ROWS} results are missing" in str(failure.value)
    run_try(numbered(ROWS), output, try_number=2)
    assert [row["index"] for row in lines_of(output)] == list(range(ROWS))
    assert {row["status"] for row in lines_of(output)} == {"succeeded"}
    # Nothing was paid twice.
    assert rows_started(dify) == list(range(ROWS))
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_the_starts_of_a_batch_share_a_connection_where_one_follows_another(dify: DifyStandIn, tmp_path: Path) -> None:
    run_try(numbered(60), tmp_path / "results.jsonl", max_active_runs=1)
    # Not all: who hangs up before the server has ended its response loses the connection.
    assert len({seen.connection for seen in dify.requests if seen.method == "POST"}) < 50


# --- what a retry asks Dify's log for


class Batch:
    """A batch of which an earlier try has left parts, and runs at Dify."""

    def __init__(self, output: Path, dify: DifyStandIn) -> None:
        self.output = output
        self.users = RowUsers.of_task(ti_of())
        self._files = ResultFiles(str(output), BatchName.of_task(ti_of()))
        self._dify = dify
        self._began = time.time()
        self._files.begin(Checkpoint(4, since=self._began))

    def write(self, rows: Iterable[int], status: str = "succeeded", **checkpoint: Any) -> None:
        results = [RowResult(row, status, workflow_run_id=str(uuid.uuid4())) for row in rows]
        lines = [(result.index, result.to_line()) for result in results]
        self._files.write(Part(lines, Checkpoint(4, rows=len(lines), since=self._began, **checkpoint)))

    def add_run(self, row: int, *statuses: str, attempt: int = 0) -> str:
        return self._dify.add_run(*statuses, user=self.users.user_of(row, attempt), created_at=int(self._began))

    def retry(self, rows: int, **arguments: Any) -> list[dict[str, Any]]:
        """Run the second try, and return its results."""
        run_try(numbered(rows), self.output, **{"try_number": 2, **arguments})
        return lines_of(self.output)

    def looks(self) -> dict[int, list[float]]:
        """Return when each row was looked for; no request was for more than one row."""
        asked = [seen for seen in self._dify.requests if "/workflows/logs" in seen.path]
        looks: dict[int, list[float]] = defaultdict(list)
        for seen in asked:
            query = parse_qs(urlsplit(seen.path).query)
            assert "created_at__after" in query
            user = query["created_by_end_user_session_id"][0]
            looks[int(user.removeprefix(f"{self.users.prefix}/").partition(".")[0])].append(seen.at)
        return looks


@pytest.fixture
def batch(dify: DifyStandIn, tmp_path: Path) -> Batch:
    return Batch(tmp_path / "results.jsonl", dify)


def test_a_retry_of_many_rows_asks_only_for_those_that_may_have_been_started(dify: DifyStandIn, batch: Batch) -> None:
    dify.add_logged_runs(2_000, user="someone else")
    batch.write(row for row in range(900) if row not in (3, 500))
    batch.add_run(3, "succeeded")
    batch.add_run(902, "running", "succeeded")
    results = batch.retry(1_000, not_found_grace=1.0)
    # Rows 3 and 500 have no result; four rows may be under way, and four have left no trace, from 902 on once more.
    looks = {row: len(found) for row, found in batch.looks().items()}
    assert sorted(looks) == [3, 500, *range(900, 911)]
    assert looks[3] == looks[902] == 1
    assert min(looks[row] for row in looks if row not in (3, 902)) >= 2
    assert rows_started(dify) == [500, 900, 901, *range(903, 1_000)]
    assert [row["index"] for row in results] == list(range(1_000))


def test_rows_that_are_written_hide_no_queued_start_although_their_runs_are_running_for_ever(
    dify: DifyStandIn, batch: Batch
) -> None:
    # Dify 1.13 and 1.14 never write the end of a run that was stopped, as at `run_timeout`.
    batch.write(range(4), "failed")
    for row in range(4):
        batch.add_run(row, "running")
    # The start of row 4 was queued when the worker was killed.
    batch.retry(5, max_failed_runs=5, not_found_grace=1.0)
    assert rows_started(dify) == [4]
    # It is looked for until the grace is over, and started then.
    looks = batch.looks()[4]
    assert max(looks) - min(looks) > 0.5


def test_a_second_earlier_try_widens_what_a_retry_asks_for(dify: DifyStandIn, batch: Batch) -> None:
    batch.write(range(10))
    batch.retry(60, try_number=3)
    assert sorted(batch.looks()) == list(range(10, 26))
    assert rows_started(dify) == list(range(10, 60))


def test_the_parts_of_an_older_version_are_taken_up(dify: DifyStandIn, batch: Batch) -> None:
    batch.write(range(3))
    for part in Path(f"{batch.output}.parts").glob("*/*"):
        part.write_text(part.read_text().replace('"since"', '"open_since"').replace('"last_lost"', '"other"'))
    batch.add_run(20, "running", "succeeded")
    assert len(batch.retry(25)) == 25
    assert rows_started(dify) == [*range(3, 20), *range(21, 25)]


@pytest.mark.parametrize("has_file", [True, False])
def test_the_first_try_of_a_batch_looks_into_no_log(dify: DifyStandIn, tmp_path: Path, has_file: bool) -> None:
    run_try(numbered(20), tmp_path / "results.jsonl" if has_file else None)
    assert not any("/workflows/logs" in seen.path for seen in dify.requests)


def test_rows_that_got_lost_hide_no_row_after_them(dify: DifyStandIn, batch: Batch) -> None:
    # Twenty starts got lost one after the other, which the checkpoint tells, and the next run is alive.
    batch.write([], last_lost=19)
    batch.add_run(20, "running", "succeeded")
    batch.retry(25)
    assert rows_started(dify) == [row for row in range(25) if row != 20]


def test_a_log_that_shows_the_runs_of_all_users_is_read_on_for_a_rows_run(
    dify: DifyStandIn, tmp_path: Path, batch: Batch
) -> None:
    batch.add_run(0, "running", "succeeded")
    dify.logs_ignore_user = True
    dify.add_logged_runs(150, user="someone else", ending=time.time() + 150)
    batch.retry(3)
    assert rows_started(dify) == [1, 2]
    dify.add_logged_runs(1_200, user="someone else", ending=time.time() + 1_350)
    with pytest.raises(DifyError, match="has too many runs of others to find row 0"):
        run_try(numbered(3), tmp_path / "others.jsonl", try_number=3)
    assert rows_started(dify) == [1, 2]


def test_rows_that_dify_rejected_hide_no_row_after_them_where_nothing_is_written(
    dify: DifyStandIn, batch: Batch
) -> None:
    alive = batch.add_run(30, "running", "succeeded")
    returned = run_try(numbered(40), try_number=2)
    assert returned[30]["workflow_run_id"] == alive
    assert rows_started(dify) == [row for row in range(40) if row != 30]


def test_a_try_lets_no_more_rows_go_without_a_trace_than_may_run_at_once(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a retry counts on, if the task is killed at any of these requests.
    monkeypatch.setattr(results, "UNLOGGED_SECONDS", 60.0)
    output = tmp_path / "results.jsonl"
    written: list[tuple[int, int]] = []

    async def reject(request: web.Request) -> web.StreamResponse:
        row = (await request.json())["inputs"]["n"]
        written.append((row, sum(path.read_text().count('"index"') for path in parts_with_rows(output))))
        return await respond(413)(request)

    dify.misbehave_always(reject, only="POST .*/run")
    run_try(numbered(60), output, max_failed_runs=60)
    assert len(written) == 60
    assert all(row - count < 8 for row, count in written)


@pytest.mark.parametrize("failures", [1, 2])
def test_a_log_that_can_not_be_read_ends_the_retry_before_anything_is_paid_twice(
    dify: DifyStandIn, batch: Batch, failures: int
) -> None:
    batch.write(range(3))
    batch.add_run(3, "running", "succeeded")
    dify.misbehave(*[respond(503)] * failures, only="GET .*/logs")
    with pytest.raises(DifyConnectionError) if failures == 2 else nullcontext():
        assert len(batch.retry(4, max_consecutive_failures=1)) == 4
    assert dify.started == []


def test_a_run_whose_record_is_not_written_yet_is_waited_for(dify: DifyStandIn, batch: Batch) -> None:
    dify.runs[batch.add_run(0, "succeeded")].has_no_record = True
    with pytest.raises(DifyConnectionError, match="no record yet of a run of user"):
        batch.retry(3, max_consecutive_failures=1)
    assert 0 not in rows_started(dify)


def test_after_retries_were_lowered_all_tries_before_this_one_may_have_left_queued_starts(
    dify: DifyStandIn, batch: Batch
) -> None:
    # Four retries when the task was made, one now. Each of two tries left four starts in Dify's queue.
    batch.users = RowUsers.of_task(ti_of(max_tries=4))
    run_try(numbered(8), try_number=3, max_tries=4)
    assert set(batch.looks()) == set(range(8))


def test_a_run_that_was_deleted_does_not_keep_a_retry_from_its_rows(dify: DifyStandIn) -> None:
    user = RowUsers.of_task(ti_of()).user_of(1, 0)
    deleted = dify.add_run("succeeded", user=user, created_at=int(time.time()) - 400)
    dify.runs[deleted].has_no_record = True
    returned = run_try(numbered(3), try_number=2)
    assert [row["status"] for row in returned] == ["succeeded"] * 3
    assert rows_started(dify) == [0, 1, 2]


# --- arguments that can't work: nothing is started


RENDERED = "render_template_as_native_obj"


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"output_path": ""}, "output_path must name a file"),
        ({"output_path": " "}, "output_path must name a file"),
        ({"output_path": "{folder}"}, "is a folder"),
        ({"output_path": "{folder}/"}, "is a folder"),
        ({"output_path": "file://{folder}"}, "is a folder"),
        ({"inputs": "{folder}/rows.jsonl", "output_path": "{folder}/rows.jsonl"}, "would replace the inputs"),
        ({"inputs": "{folder}/rows.jsonl", "output_path": "file://{folder}/rows.jsonl"}, "would replace the inputs"),
        ({"user": 5}, "user"),
        ({"user": ""}, "user"),
        ({"user": ["me"]}, "user"),
        # A list that a template made text of.
        ({"inputs": "[{'n': 1}]"}, RENDERED),
        ({"inputs": ' [{"n": 1}] '}, RENDERED),
        ({"inputs": "{'n': 1}"}, RENDERED),
        ({"inputs": "[]"}, RENDERED),
    ],
)
def test_arguments_that_can_not_work_are_refused(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], why: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"n": 1}\n')
    filled = {k: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for k, v in arguments.items()}
    with pytest.raises(DifyConfigurationError, match=why):
        run_try(**{"inputs": numbered(1), **filled})
    assert rows.read_text() == '{"n": 1}\n'
    assert dify.started == []


# --- results


@pytest.mark.parametrize(
    ("output", "why"),
    [({"__classname__": "os.system"}, "serialized objects of Airflow"), ([[]] * 3, None)],
)
def test_outputs_that_can_not_be_an_xcom_end_a_batch_without_a_file(
    dify: DifyStandIn, tmp_path: Path, output: Any, why: str | None
) -> None:
    dify.starts += [Start(), Start(fields={"outputs": {"answer": output}}), Start()]
    if why is None:
        assert run_try(numbered(3))[1]["outputs"] == {"answer": output}
        return
    with pytest.raises(DifyOutputsError, match=rf"Row 1 .*{why}.*output_path"):
        run_try(numbered(3))
    # A file takes them.
    run_try(numbered(3), tmp_path / "results.jsonl")


def test_a_million_rows_that_can_not_be_run_are_written_in_parts(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "PART_ROWS", 100)
    output = tmp_path / "results.jsonl"
    counted: list[int] = []
    run_try([None] * 1500, output, max_failed_runs=1.0, at_end=lambda: counted.append(len(parts_with_rows(output))))
    assert [row["index"] for row in lines_of(output)] == list(range(1500))
    assert counted[0] > 5


def test_a_row_that_is_too_large_for_a_proxy_fails_alone_and_at_once(dify: DifyStandIn) -> None:
    # As nginx responds, whose limit is 1 MB where nobody has raised it.
    page = "<html><head><title>413 Request Entity Too Large</title></head></html>"
    dify.misbehave(respond(413, page, content_type="text/html"), only="POST .*/run")
    returned = run_try(numbered(6), max_failed_runs=1)
    assert [row["status"] for row in returned].count("succeeded") == 5
    (failed,) = [row for row in returned if row["status"] == "failed"]
    assert failed["attempts"] == 0
    assert "HTTP 413" in failed["error"]
    assert "client_max_body_size" in failed["error"]
    assert sum(request.method == "POST" for request in dify.requests) == 6


def test_a_row_without_a_run_says_so_in_the_log(dify: DifyStandIn, caplog: pytest.LogCaptureFixture) -> None:
    dify.user_input_form = [form_field("query", required=True)]
    run_try([{}, [1]], max_failed_runs=2)
    messages = [record.getMessage() for record in caplog.records]
    for row in (0, 1):
        assert any(line.startswith(f"Row {row} failed: ") and line.endswith(" (no workflow run)") for line in messages)
    assert not any("None" in message for message in messages)


def test_a_start_that_failed_has_no_hole_in_its_line(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", 0.01)
    said = b'data: {"event": "error", "message": "1 validation error for VariableEntity", "status": 500}\n\n'
    headers = {"X-Version": "1.16.1"}
    dify.misbehave(respond(200, said, content_type="text/event-stream", headers=headers), times=2, only="POST .*/run")
    run_try(numbered(1), max_failed_runs=1, run_retries=1)
    lines = [record.getMessage() for record in caplog.records if "VariableEntity" in record.getMessage()]
    assert lines[0].startswith("Row 0: its start failed and is started again in")
    assert lines[-1].startswith("Row 0 failed: 1 validation error")
    assert lines[-1].endswith(" (no workflow run)")


def test_what_a_run_says_of_its_failure_is_one_short_line_of_the_log(
    dify: DifyStandIn, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", 0.01)
    said = "no such model\n2026-11-28 INFO all is well \x1b[31m" + "x" * 100_000
    dify.starts += [Start("run_streaming_failed", fields={"error": said})] * 4
    returned = run_try(numbered(2), max_failed_runs=2, run_retries=1)
    # The result has it as it is.
    assert all(row["error"].startswith(said[:1000]) for row in returned)
    messages = [record.getMessage() for record in caplog.records if "no such model" in record.getMessage()]
    assert len(messages) == 4
    assert all(message.isprintable() and len(message) < 2000 for message in messages)
