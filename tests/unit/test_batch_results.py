"""The results of a batch: written in parts, read back after a crash, merged in row order."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from airflow.providers.common.compat.sdk import ObjectStoragePath

from airflow_provider_dify.batch.naming import BatchName
from airflow_provider_dify.batch.output import MAX_RETURNED_ROWS, FileOutput, ResultFiles, ReturnedOutput, merge_parts
from airflow_provider_dify.batch.progress import BatchProgress
from airflow_provider_dify.batch.results import (
    PART_BYTES,
    PART_ROWS,
    PART_SECONDS,
    UNLOGGED_SECONDS,
    Checkpoint,
    Part,
    PartBuffer,
    RowResult,
    RowSet,
)
from airflow_provider_dify.batch.resuming import EarlierTries
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyError, DifyOutputsError
from tests.combinations import each_or_long
from tests.unit.memory_storage import attach_memory
from tests.unit.test_workflow_run import make_run

BATCH = BatchName("0" * 16)
RESULT = RowResult(7, "succeeded", {"text": "é\n\ud800"}, None, "run-7", 12, 0.5, 2)


def results_of(rows: list[int]) -> list[RowResult]:
    return [RowResult(row, "succeeded", {"n": row}) for row in rows]


def write_parts(files: ResultFiles, *parts: list[int], since: float = 0.0) -> None:
    for rows in parts:
        buffer = PartBuffer(Checkpoint(8, since=since))
        for result in results_of(rows):
            buffer.add(result, 0)
        files.write(buffer.take())


def rows_in(text: str) -> list[int]:
    return [json.loads(line)["index"] for line in text.splitlines()]


# --- a result


def test_a_result_is_one_line_with_the_eight_fields() -> None:
    line = RESULT.to_line()
    assert line.count("\n") == 1
    fields = ["index", "status", "outputs", "error", "workflow_run_id", "total_tokens", "elapsed_time", "attempts"]
    assert list(json.loads(line)) == fields
    assert RowResult.from_line(line) == RESULT


def test_a_run_that_is_over_is_a_result() -> None:
    run = make_run("failed", error="no such model", total_tokens=5, elapsed_time=1.5)
    result = replace(RowResult.of_run(3, run), attempts=2)
    assert result == RowResult(3, "failed", run.outputs, "no such model", run.id, 5, 1.5, 2)
    assert type(result.status) is str


@pytest.mark.parametrize("line", ["", "\n", '{"index": 1', RESULT.to_line()[:-1], "[1]\n", '{"a": 1}\n', "null\n"])
def test_what_is_no_whole_result_is_none(line: str) -> None:
    assert RowResult.from_line(line) is None


# --- the buffer


def test_a_part_is_due_when_it_is_full_or_old() -> None:
    buffer = PartBuffer(Checkpoint(8))
    assert not buffer.is_due(1e9)
    buffer.add(RESULT, 100)
    assert not buffer.is_due(100 + PART_SECONDS - 1)
    assert buffer.is_due(100 + PART_SECONDS)
    buffer.take()
    assert not buffer.is_due(1e9)
    for result in results_of(list(range(PART_ROWS))):
        buffer.add(result, 100)
    assert buffer.is_due(100)
    buffer.take()
    buffer.add(replace(RESULT, outputs={"text": "x" * PART_BYTES}), 100)
    assert buffer.is_due(100)
    # What Dify's log does not know is written soon.
    buffer.take()
    buffer.add(RESULT, 100)
    buffer.add(RowResult(9, "failed", error="Line 10 is no JSON.", attempts=0), 100)
    buffer.add(replace(RESULT, index=10), 100)
    assert buffer.is_due(100 + UNLOGGED_SECONDS)


def test_a_part_is_sorted_and_named_for_its_first_row_and_never_as_another() -> None:
    buffer = PartBuffer(Checkpoint(8))
    for row in (9, 3, 5):
        buffer.add(RowResult(row, "succeeded"), 0)
    part = buffer.take()
    assert [row for row, _ in part.lines] == [3, 5, 9]
    assert part.name.startswith("000000003-")
    assert part.name != part.name


def test_a_checkpoint_names_the_runs_that_were_stopped_and_the_last_row_that_got_lost() -> None:
    buffer = PartBuffer(Checkpoint(8, since=5))
    for row in (7, 3):
        buffer.add_lost(row, 100)
    assert buffer.is_due(100 + UNLOGGED_SECONDS)
    buffer.add(RESULT, 100)
    checkpoint = buffer.take(("run-1",)).checkpoint
    assert Checkpoint.from_line(checkpoint.to_line()) == Checkpoint(8, ("run-1",), 1, 5, 7)
    assert buffer.take().checkpoint == Checkpoint(8, (), 1, 5, 7)
    # Of another version.
    line = '{"checkpoint": {"open_since": 9.5, "max_active_runs": 8, "stopped_runs": ["run-1"], "rows": 3}}\n'
    assert Checkpoint.from_line(line) == Checkpoint(8, ("run-1",), 3)


@pytest.mark.parametrize("line", ["", '{"checkpoint": {}}\n', '{"checkpoint": 1}\n', RESULT.to_line(), "[]\n", "{"])
def test_what_is_no_checkpoint_is_none(line: str) -> None:
    assert Checkpoint.from_line(line) is None


# --- the set of rows


def test_a_set_of_rows_knows_them_in_a_byte_each() -> None:
    rows = RowSet()
    assert rows.last == -1
    assert [rows.add(row) for row in (999_999, 3, 3)] == [True, True, False]
    assert 3 in rows
    assert 4 not in rows
    assert -1 not in rows
    assert (len(rows), rows.last) == (2, 999_999)


# --- the files


@pytest.fixture(params=["file", "memory"])
def output_path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "file":
        return f"file://{tmp_path}/out/results.jsonl"
    attach_memory()
    return "memory://bucket/results.jsonl"


def read(path: str) -> str:
    return str(ObjectStoragePath(path).read_text())


def exists(path: str) -> bool:
    return bool(ObjectStoragePath(path).exists())


@pytest.mark.parametrize("parts", [[[0, 2, 3], [1, 9], [4, 5, 6], [7, 8]], []], ids=["parts", "no rows"])
def test_parts_are_merged_in_row_order_and_leave_nothing(output_path: str, parts: list[list[int]]) -> None:
    files = ResultFiles(output_path, BATCH)
    files.begin(Checkpoint(8))
    write_parts(files, *parts)
    files.merge(0)
    assert read(output_path) == "".join(result.to_line() for result in results_of(list(range(sum(map(len, parts))))))
    files.remove_parts()
    assert not exists(f"{output_path}.parts")
    assert exists(output_path)


def test_results_that_were_written_are_read_back(output_path: str) -> None:
    files = ResultFiles(output_path, BATCH)
    assert files.read_written().checkpoint is None
    files.begin(Checkpoint(4, ("a",), since=7))
    write_parts(files, [0, 2], [1], since=5)
    files.write(Part([], Checkpoint(2, ("b",), since=6, last_lost=4)))
    seen: list[RowResult] = []
    written = ResultFiles(output_path, BATCH).read_written(seen.append)
    assert sorted(result.index for result in seen) == [0, 1, 2]
    assert seen[0] == RowResult(seen[0].index, "succeeded", {"n": seen[0].index})
    assert [row in written.rows for row in range(4)] == [True, True, True, False]
    assert written.checkpoint is not None
    assert written.checkpoint.max_active_runs == 8
    assert (written.checkpoint.since, written.checkpoint.last_lost) == (5, 4)
    assert set(written.checkpoint.stopped_runs) == {"a", "b"}
    assert not written.is_complete


def test_two_mapped_tasks_with_one_file_are_refused_before_anything_is_started(output_path: str) -> None:
    first, second = (ResultFiles(output_path, replace(BATCH, map_index=index)) for index in (0, 1))
    first.begin(Checkpoint(8))
    with pytest.raises(DifyConfigurationError, match=r"map index 0 of this task, too.*{{ ti.map_index }}"):
        second.begin(Checkpoint(8))
    # Another Dag run's batch may have left its parts: it is no mistake to replace its results.
    ResultFiles(output_path, BatchName("1" * 16, 0)).begin(Checkpoint(8))
    write_parts(first, [0])
    first.merge(1)
    first.remove_parts()
    second.begin(Checkpoint(8))


def test_parts_of_before_the_task_was_cleared_are_removed_in_the_end(output_path: str) -> None:
    before = [ResultFiles(output_path, replace(BATCH, generation=generation)) for generation in (0, 2)]
    others = [
        ResultFiles(output_path, name)
        for name in (replace(BATCH, generation=11), BatchName("1" * 16), replace(BATCH, map_index=3))
    ]
    for files in (*before, *others):
        write_parts(files, [0, 1])
    cleared = ResultFiles(output_path, replace(BATCH, generation=10))
    assert len(cleared.read_written().rows) == 0
    write_parts(cleared, [0])
    cleared.merge(0)
    cleared.remove_parts()
    assert [len(files.read_written().rows) for files in before] == [0, 0]
    assert [len(files.read_written().rows) for files in others] == [2, 2, 2]


@pytest.mark.parametrize("step", each_or_long([1, 29], short=[29]))
def test_a_part_that_was_cut_counts_up_to_its_last_whole_line(tmp_path: Path, step: int) -> None:
    output = tmp_path / "results.jsonl"
    files = ResultFiles(str(output), BATCH)
    files.begin(Checkpoint(8, since=1))
    write_parts(files, [0, 1, 2], since=99)
    folder = tmp_path / "results.jsonl.parts" / BATCH.folder
    (part,) = [path for path in folder.iterdir() if path.stat().st_size > 200]
    whole = part.read_bytes()
    for length in range(0, len(whole), step):
        part.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        written = files.read_written()
        assert len(written.rows) == min(lines, 3)
        # What the cut part would have said of the rest isn't true without its rows.
        assert written.checkpoint == Checkpoint(8, since=1)
        files.merge(0)
        assert rows_in(read(str(output))) == list(range(min(lines, 3)))
        (folder / "merged").unlink()


@pytest.mark.parametrize("damaged", [False, True])
def test_a_part_that_was_removed_is_missed(output_path: str, damaged: bool) -> None:
    files = ResultFiles(output_path, BATCH)
    files.begin(Checkpoint(8, since=200))
    buffer = PartBuffer(Checkpoint(8, since=200))
    for row in range(4):
        buffer.add(RowResult(row, "succeeded"), 0)
        files.write(buffer.take())
    if damaged:
        next(ObjectStoragePath(f"{output_path}.parts/{BATCH.folder}").glob("000000002-*")).unlink()
    progress = BatchProgress(4, 0, began_at=0)
    output = FileOutput(ResultFiles(output_path, BATCH), 8, progress, EarlierTries(100, True, 1))
    assert (output.earlier.since, output.earlier.has_parts) == (200, not damaged)
    assert [output.has(row) for row in range(4)] == [True, True, not damaged, True]


def test_a_row_that_two_parts_have_is_there_once(output_path: str) -> None:
    files = ResultFiles(output_path, BATCH)
    write_parts(files, [0, 1, 2], [1, 2, 3], [2])
    assert len(files.read_written().rows) == 4
    files.merge(0)
    assert rows_in(read(output_path)) == [0, 1, 2, 3]


def test_an_interrupted_merge_is_done_again(output_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = ResultFiles(output_path, BATCH)
    write_parts(files, list(range(50)), list(range(50, 100)))
    real = merge_parts

    def cut(parts: Any) -> Iterator[tuple[int, str]]:
        for row, line in real(parts):
            if row == 60:
                raise KeyboardInterrupt
            yield row, line

    monkeypatch.setattr("airflow_provider_dify.batch.output.merge_parts", cut)
    with pytest.raises(KeyboardInterrupt):
        files.merge(0)
    monkeypatch.undo()
    again = ResultFiles(output_path, BATCH)
    assert len(again.read_written().rows) == 100
    again.merge(0)
    assert rows_in(read(output_path)) == list(range(100))


def test_after_the_merge_the_file_counts_and_not_what_is_left_of_the_parts(output_path: str) -> None:
    files = ResultFiles(output_path, BATCH)
    write_parts(files, [0, 1], [2, 3])
    files.merge(0)
    next(
        path for path in ObjectStoragePath(f"{output_path}.parts/{BATCH.folder}").iterdir() if "-" in path.name
    ).unlink()
    again = ResultFiles(output_path, BATCH)
    written = again.read_written()
    assert written.is_complete
    assert len(written.rows) == 4
    again.merge(0)
    assert len(read(output_path).splitlines()) == 4
    again.remove_parts()
    assert not exists(f"{output_path}.parts")


def test_a_storage_that_can_not_be_written_is_a_dify_error(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl.parts").write_text("a file where a folder should be")
    with pytest.raises(DifyError, match="could not be written"):
        ResultFiles(str(tmp_path / "results.jsonl"), BATCH).begin(Checkpoint(8))
    # This one fails without a retry.
    with pytest.raises(DifyConfigurationError, match="nosuch"):
        ResultFiles("nosuch://bucket/results.jsonl", BATCH)


# --- the merge


def test_a_merge_opens_a_part_when_its_first_row_is_due() -> None:
    opened: list[int] = []

    def part(number: int, rows: list[int]) -> tuple[int, Iterator[str]]:
        def lines() -> Iterator[str]:
            opened.append(number)
            yield from (RowResult(row, "succeeded").to_line() for row in rows)

        return rows[0], lines()

    merged = merge_parts([part(0, [0, 1, 8]), part(1, [2, 3, 4]), part(2, [5, 6, 7]), part(3, [9])])
    seen = []
    for row, _ in merged:
        seen.append(row)
        if row == 2:
            assert opened == [0, 1]
    assert seen == list(range(10))
    assert opened == [0, 1, 2, 3]


def test_any_order_of_ends_is_merged_in_row_order() -> None:
    shuffled = random.Random(13)
    for _ in range(50):
        rows = list(range(300))
        # At most 20 rows are under way at once; a row's neighbours may end long after it.
        ends = sorted(rows, key=lambda row: row + shuffled.choice([0, 0, 5, 20, 200]))
        parts = [sorted(ends[at : at + 17]) for at in range(0, 300, 17)]
        streams = [(part[0], iter([RowResult(row, "s").to_line() for row in part])) for part in sorted(parts)]
        assert [row for row, _ in merge_parts(streams)] == rows


@pytest.mark.long
def test_a_merge_holds_no_more_than_a_few_lines_of_each_part(tmp_path: Path) -> None:
    files = ResultFiles(str(tmp_path / "results.jsonl"), BATCH)
    for start in range(0, 20_000, 1000):
        buffer = PartBuffer(Checkpoint(8))
        for row in range(start, start + 1000):
            buffer.add(RowResult(row, "succeeded", {"text": "x" * 2000}), 0)
        files.write(buffer.take())
    tracemalloc.start()
    try:
        files.merge(0)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "results.jsonl").stat().st_size > 40_000_000
    assert peak < 5_000_000


# --- the return value


def test_a_return_value_has_the_results_in_row_order() -> None:
    results = ReturnedOutput(3, EarlierTries(0, False, 0))
    for row in (2, 0, 1):
        results.add(RowResult(row, "succeeded", {"n": row}))
    returned = results.finish()
    assert [result["index"] for result in returned] == [0, 1, 2]
    assert json.loads(json.dumps(returned)) == returned


def test_too_many_rows_for_a_return_value_are_refused_before_anything_is_started() -> None:
    ReturnedOutput(MAX_RETURNED_ROWS, EarlierTries(0, False, 0))
    with pytest.raises(DifyConfigurationError, match=r"1,001 rows.*output_path.*Nothing was started"):
        ReturnedOutput(MAX_RETURNED_ROWS + 1, EarlierTries(0, False, 0))


def test_too_much_for_a_return_value_ends_the_batch_as_soon_as_it_is_known() -> None:
    results = ReturnedOutput(3, EarlierTries(0, False, 0))
    results.add(RowResult(0, "succeeded", {"text": "x" * 600_000}))
    with pytest.raises(DifyOutputsError, match="output_path"):
        results.add(RowResult(1, "succeeded", {"text": "x" * 600_000}))
