"""A batch as a task's try, over real HTTP: what becomes of its files when something is wrong with them."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from airflow_provider_dify.batch import results
from airflow_provider_dify.batch.naming import BatchName, RowUsers
from airflow_provider_dify.batch.output import ResultFiles
from airflow_provider_dify.batch.results import Checkpoint, Part, RowResult
from airflow_provider_dify.batch.row import BatchSettings
from airflow_provider_dify.batch.running import BatchTask
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyConnectionError, DifyError, DifyOutputsError
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.runs.waiting import WaitArguments
from tests.dify_stand_in import DifyStandIn, Start, form_field, respond

if TYPE_CHECKING:
    from aiohttp import web

pytestmark = pytest.mark.usefixtures("dify_connection")

ROWS = 40
WAIT = WaitArguments(poll_interval=0.05, not_found_grace=0.2)
SETTINGS = BatchSettings([], WAIT, max_active_runs=4, timeout=60.0, retries=1)


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"n": n} for n in range(count)]


def run_try(
    inputs: Any,
    output_path: Any = None,
    *,
    user: Any = None,
    run_retries: int = 0,
    max_failed_runs: float = 0,
    try_number: int = 1,
    max_tries: int = 1,
    max_consecutive_failures: int = 5,
    at_end: Callable[[], object] = lambda: None,
) -> Any:
    """Run a try of a task with one retry; when its runs are over, and before their results are merged, do something."""
    ti = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, try_number=try_number)
    ti.max_tries = max_tries
    summaries: list[dict[str, Any]] = []

    def push(summary: dict[str, Any]) -> None:
        summaries.append(summary)
        if len(summaries) == 2:
            at_end()

    wait = replace(WAIT, max_consecutive_failures=max_consecutive_failures)
    settings = replace(
        SETTINGS,
        inputs=inputs,
        wait=wait,
        output_path=None if output_path is None else str(output_path),
        max_failed_runs=max_failed_runs,
        run_retries=run_retries,
        user=user,
    )
    context: Any = {"ti": ti}
    task = BatchTask(settings, context, DifyHook(), logging.getLogger("batch"), push)
    return task.run(lambda app_id: None)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def parts_with_rows(output: Path) -> list[Path]:
    return sorted(path for path in Path(f"{output}.parts").glob("*/*-*") if '"index"' in path.read_text())


def cut(part: Path) -> None:
    os.truncate(part, part.stat().st_size // 2)


@pytest.mark.parametrize("which", [0, 1, -1], ids=["first", "second", "last"])
@pytest.mark.parametrize("damage", [Path.unlink, cut], ids=["removed", "cut"])
def test_a_part_that_is_gone_fails_the_try_and_the_retry_reads_its_rows_from_the_log(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None], which: int
) -> None:
    # Many parts: a later one says that what came before is written.
    monkeypatch.setattr(results, "PART_SECONDS", 0.0)
    dify.run_duration = 0.1
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
    assert sorted(started.inputs["n"] for started in dify.started) == list(range(ROWS))
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


def test_rows_that_are_written_hide_no_queued_start_although_their_runs_are_running_for_ever(
    dify: DifyStandIn, tmp_path: Path
) -> None:
    # Dify 1.13 and 1.14 never write the end of a run that was stopped, as at `run_timeout`.
    output = tmp_path / "results.jsonl"
    earlier = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, try_number=1, max_tries=1)
    users = RowUsers.of_task(earlier)
    files = ResultFiles(str(output), BatchName.of_task(earlier))
    began = time.time()
    files.begin(Checkpoint(4, since=began))
    written = [RowResult(row, "failed", workflow_run_id=str(uuid.uuid4())) for row in range(4)]
    lines = [(result.index, result.to_line()) for result in written]
    files.write(Part(lines, Checkpoint(4, rows=4, since=began)))
    for result in written:
        user = users.user_of(result.index, 0)
        dify.add_run("running", run_id=result.workflow_run_id, user=user, created_at=int(began))
    # The start of row 4 was queued when the worker was killed.
    run_try(numbered(5), output, max_failed_runs=5, try_number=2)
    user = users.user_of(4, 0)
    looks = [seen.at for seen in dify.requests if f"session_id={quote(user, safe='/')}" in seen.path]
    started = [start.user for start in dify.started]
    assert started == [user]
    # It is looked for until the grace is over, and started then.
    assert len(looks) >= 2
    assert max(looks) - min(looks) > WAIT.not_found_grace / 2


def test_the_starts_of_a_batch_share_a_connection_where_one_follows_another(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.unit.test_batch_task.SETTINGS", replace(SETTINGS, max_active_runs=1))
    run_try(numbered(60), tmp_path / "results.jsonl")
    # Not all: who hangs up before the server has ended its response loses the connection.
    assert len({seen.connection for seen in dify.requests if seen.method == "POST"}) < 50


# --- what a retry asks Dify's log for


class Batch:
    """A batch of which an earlier try has left parts, and runs at Dify."""

    def __init__(self, output: Path, dify: DifyStandIn) -> None:
        ti = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, try_number=1, max_tries=1)
        self.users = RowUsers.of_task(ti)
        self.files = ResultFiles(str(output), BatchName.of_task(ti))
        self._dify = dify
        self._began = time.time()
        self.files.begin(Checkpoint(4, since=self._began))

    def write(self, rows: Iterable[int], **checkpoint: Any) -> None:
        results = [RowResult(row, "succeeded", workflow_run_id=str(uuid.uuid4())) for row in rows]
        lines = [(result.index, result.to_line()) for result in results]
        self.files.write(Part(lines, Checkpoint(4, rows=len(lines), since=self._began, **checkpoint)))

    def add_run(self, row: int, *statuses: str, attempt: int = 0) -> None:
        self._dify.add_run(*statuses, user=self.users.user_of(row, attempt), created_at=int(self._began))

    def looks(self) -> dict[int, int]:
        """Return how often each row was looked for; no request was for more than one row."""
        asked = [parse_qs(urlsplit(seen.path).query) for seen in self._dify.requests if "/workflows/logs" in seen.path]
        users = [query["created_by_end_user_session_id"][0] for query in asked]
        assert all("created_at__after" in query for query in asked)
        return Counter(int(user.removeprefix(f"{self.users.prefix}/").partition(".")[0]) for user in users)

    def rows_started(self) -> list[int]:
        return sorted(started.inputs["n"] for started in self._dify.started)


@pytest.fixture
def batch(dify: DifyStandIn, tmp_path: Path) -> Batch:
    return Batch(tmp_path / "results.jsonl", dify)


def test_a_retry_of_many_rows_asks_only_for_those_that_may_have_been_started(
    dify: DifyStandIn, tmp_path: Path, batch: Batch
) -> None:
    dify.add_logged_runs(2_000, user="someone else")
    batch.write(row for row in range(900) if row not in (3, 500))
    batch.add_run(3, "succeeded")
    batch.add_run(902, "running", "succeeded")
    run_try(numbered(1_000), tmp_path / "results.jsonl", try_number=2)
    # Rows 3 and 500 have no result; four rows may be under way, and four have left no trace, from 902 on once more.
    looks = batch.looks()
    assert sorted(looks) == [3, 500, *range(900, 911)]
    assert looks[3] == looks[902] == 1
    assert min(looks[row] for row in looks if row not in (3, 902)) >= 2
    assert batch.rows_started() == [500, 900, 901, *range(903, 1_000)]
    assert [row["index"] for row in lines_of(tmp_path / "results.jsonl")] == list(range(1_000))


def test_a_second_earlier_try_widens_what_a_retry_asks_for(dify: DifyStandIn, tmp_path: Path, batch: Batch) -> None:
    batch.write(range(10))
    run_try(numbered(60), tmp_path / "results.jsonl", try_number=3)
    assert sorted(batch.looks()) == list(range(10, 26))
    assert batch.rows_started() == list(range(10, 60))


def test_the_parts_of_an_older_version_are_taken_up(dify: DifyStandIn, tmp_path: Path, batch: Batch) -> None:
    batch.write(range(3))
    (folder,) = (tmp_path / "results.jsonl.parts").iterdir()
    for part in folder.iterdir():
        part.write_text(part.read_text().replace('"since"', '"open_since"').replace('"last_lost"', '"other"'))
    batch.add_run(20, "running", "succeeded")
    run_try(numbered(25), tmp_path / "results.jsonl", try_number=2)
    assert batch.rows_started() == [*range(3, 20), *range(21, 25)]
    assert len(lines_of(tmp_path / "results.jsonl")) == 25


@pytest.mark.parametrize("has_file", [True, False])
def test_the_first_try_of_a_batch_looks_into_no_log(dify: DifyStandIn, tmp_path: Path, has_file: bool) -> None:
    run_try(numbered(20), tmp_path / "results.jsonl" if has_file else None)
    assert not any("/workflows/logs" in seen.path for seen in dify.requests)


def test_rows_that_got_lost_hide_no_row_after_them(dify: DifyStandIn, tmp_path: Path, batch: Batch) -> None:
    # Twenty starts got lost one after the other, which the checkpoint tells, and the next run is alive.
    batch.write([], last_lost=19)
    batch.add_run(20, "running", "succeeded")
    run_try(numbered(25), tmp_path / "results.jsonl", try_number=2)
    assert batch.rows_started() == [row for row in range(25) if row != 20]


def test_a_log_that_shows_the_runs_of_all_users_is_read_on_for_a_rows_run(
    dify: DifyStandIn, tmp_path: Path, batch: Batch
) -> None:
    batch.add_run(0, "running", "succeeded")
    dify.logs_ignore_user = True
    dify.add_logged_runs(150, user="someone else", ending=time.time() + 150)
    run_try(numbered(3), tmp_path / "results.jsonl", try_number=2)
    assert batch.rows_started() == [1, 2]
    dify.add_logged_runs(1_200, user="someone else", ending=time.time() + 1_350)
    with pytest.raises(DifyError, match="has too many runs of others to find row 0"):
        run_try(numbered(3), tmp_path / "others.jsonl", try_number=3)
    assert batch.rows_started() == [1, 2]


def test_rows_that_dify_rejected_hide_no_row_after_them_where_nothing_is_written(dify: DifyStandIn) -> None:
    users = RowUsers.of_task(SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, max_tries=1))
    alive = dify.add_run("running", "succeeded", user=users.user_of(30, 0), created_at=int(time.time()))
    returned = run_try(numbered(40), try_number=2)
    assert returned[30]["workflow_run_id"] == alive
    assert sorted(started.inputs["n"] for started in dify.started) == [row for row in range(40) if row != 30]


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
    dify: DifyStandIn, tmp_path: Path, batch: Batch, failures: int
) -> None:
    batch.write(range(3))
    batch.add_run(3, "running", "succeeded")
    dify.misbehave(*[respond(503)] * failures, only="GET .*/logs")
    if failures == 1:
        run_try(numbered(4), tmp_path / "results.jsonl", try_number=2, max_consecutive_failures=1)
        assert len(lines_of(tmp_path / "results.jsonl")) == 4
    else:
        with pytest.raises(DifyConnectionError):
            run_try(numbered(4), tmp_path / "results.jsonl", try_number=2, max_consecutive_failures=1)
    assert dify.started == []


def test_a_run_whose_record_is_not_written_yet_is_waited_for(dify: DifyStandIn, tmp_path: Path, batch: Batch) -> None:
    run_id = dify.add_run("succeeded", user=batch.users.user_of(0, 0), created_at=int(time.time()))
    dify.runs[run_id].has_no_record = True
    with pytest.raises(DifyConnectionError, match="no record yet of a run of user"):
        run_try(numbered(3), tmp_path / "results.jsonl", try_number=2, max_consecutive_failures=1)
    assert 0 not in batch.rows_started()


def test_after_retries_were_lowered_all_tries_before_this_one_may_have_left_queued_starts(dify: DifyStandIn) -> None:
    # Four retries when the task was made, one now. Each of two tries left four starts in Dify's queue.
    ti = SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, max_tries=4)
    users = RowUsers.of_task(ti)
    run_try(numbered(8), try_number=3, max_tries=4)
    for row in range(8):
        assert any(f"session_id={quote(users.user_of(row, 0), safe='/')}" in seen.path for seen in dify.requests), row


def test_a_run_that_was_deleted_does_not_keep_a_retry_from_its_rows(dify: DifyStandIn) -> None:
    users = RowUsers.of_task(SimpleNamespace(dag_id="dag", task_id="task", run_id="run", map_index=-1, max_tries=1))
    deleted = dify.add_run("succeeded", user=users.user_of(1, 0), created_at=int(time.time()) - 400)
    dify.runs[deleted].has_no_record = True
    returned = run_try(numbered(3), try_number=2)
    assert [row["status"] for row in returned] == ["succeeded"] * 3
    assert sorted(started.inputs["n"] for started in dify.started) == [0, 1, 2]


# --- arguments that can't work: nothing is started


@pytest.mark.parametrize("output_path", ["", " "])
def test_an_output_path_that_names_no_file_is_refused(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output_path: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DifyConfigurationError, match="output_path must name a file"):
        run_try(numbered(1), output_path)
    assert dify.started == []


@pytest.mark.parametrize("url", ["{}", "{}/", "file://{}"])
def test_an_output_path_that_is_a_folder_is_refused(dify: DifyStandIn, tmp_path: Path, url: str) -> None:
    with pytest.raises(DifyConfigurationError, match="is a folder"):
        run_try(numbered(1), url.format(tmp_path))
    assert dify.started == []


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_results_never_replace_the_inputs(dify: DifyStandIn, tmp_path: Path, url: str) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"n": 1}\n')
    with pytest.raises(DifyConfigurationError, match="would replace the inputs"):
        run_try(str(rows), url.format(rows))
    assert rows.read_text() == '{"n": 1}\n'
    assert dify.started == []


@pytest.mark.parametrize("user", [5, "", ["me"]])
def test_a_user_that_is_no_text_is_refused(dify: DifyStandIn, user: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="user"):
        run_try(numbered(1), user=user)
    assert dify.started == []


@pytest.mark.parametrize("text", ["[{'n': 1}]", ' [{"n": 1}] ', "{'n': 1}", "[]"])
def test_a_list_that_was_rendered_to_text_is_refused_with_the_way_out(text: str) -> None:
    with pytest.raises(DifyConfigurationError, match="render_template_as_native_obj"):
        run_try(text)


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
    run_try([None] * 3000, output, max_failed_runs=1.0, at_end=lambda: counted.append(len(parts_with_rows(output))))
    assert [row["index"] for row in lines_of(output)] == list(range(3000))
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
    assert any(message.startswith("Row 0 failed: ") and message.endswith(" (no workflow run)") for message in messages)
    assert any(message.startswith("Row 1 failed: ") and message.endswith(" (no workflow run)") for message in messages)
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
