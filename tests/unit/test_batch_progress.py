"""How far a batch is: counts, the line, the summary, and what it fails with."""

from __future__ import annotations

import pickle
import re
from typing import Any

import pytest

from airflow_provider_dify.batch.progress import BatchProgress, FailureLimit, short_number, short_time
from airflow_provider_dify.batch.results import RowResult
from airflow_provider_dify.exceptions import DifyBatchFailed, DifyConfigurationError

RUN = "5ad498c7-41ae-4e1c-9bd2-6dd2e9ac8b22"


def progress_of(total: int, allowed: float = 0, **kwargs: Any) -> BatchProgress:
    return BatchProgress(total, FailureLimit(allowed), began_at=1000.0, **kwargs)


def add(progress: BatchProgress, *statuses: str, error: str | None = None, tokens: int = 0) -> None:
    for status in statuses:
        progress.add(RowResult(progress.over, status, error=error, total_tokens=tokens, workflow_run_id=RUN))


def test_the_line_tells_all_that_a_waiting_person_asks_for() -> None:
    progress = progress_of(1000, 5)
    progress.begin(1000)
    assert progress.line(8, 1030) == "0 of 1,000 runs are over, 8 active"
    add(progress, *["succeeded"] * 409, tokens=3000)
    add(progress, "failed", "failed", "stopped")
    line = progress.line(8, 1000 + 412 / 3.4)
    assert line == "412 of 1,000 runs are over (3 failed), 8 active, 1.2 M tokens, 3.4 runs/s, about 3 min left"


@pytest.mark.parametrize(
    ("total", "earlier", "now", "seconds", "said"),
    [
        # Rows of an earlier try do not count for the speed.
        (1000, 500, 10, 10, "1.0 runs/s, about 8 min left"),
        (10, 0, 1, 60, "1.0 runs/min, about 9 min left"),
    ],
)
def test_the_speed_is_that_of_this_try(total: int, earlier: int, now: int, seconds: float, said: str) -> None:
    progress = progress_of(total)
    add(progress, *["succeeded"] * earlier)
    progress.begin(1000)
    add(progress, *["succeeded"] * now)
    assert said in progress.line(8, 1000 + seconds)


def test_the_speed_is_that_of_the_last_lines() -> None:
    progress = progress_of(10_000)
    progress.begin(0)
    add(progress, *["succeeded"] * 3000)
    for now in range(30, 360, 30):
        add(progress, *["succeeded"] * 30)
        line = progress.line(8, now)
    assert "1.0 runs/s" in line


def test_the_summary_has_the_eight_counts_at_the_start_and_at_the_end() -> None:
    progress = progress_of(6, output_path="s3://bucket/results.jsonl")
    counts = ["succeeded", "partial_succeeded", "failed", "stopped", "total_tokens", "elapsed_time"]
    beginning = {"total": 6, **dict.fromkeys(counts, 0), "output_path": "s3://bucket/results.jsonl"}
    assert progress.summary(1000) == beginning
    assert list(progress.summary(1000)) == list(beginning)
    # A status that nobody knows yet is no success.
    add(progress, "succeeded", "succeeded", "partial-succeeded", "failed", "stopped", "exploded", tokens=2)
    assert progress.summary(1002.5) == {**beginning, **dict(zip(counts, (2, 1, 2, 1, 12, 2.5), strict=True))}
    assert progress.failed_rows == 3


@pytest.mark.parametrize(("fails", "failed"), [(False, 0), (True, 1)])
def test_a_partial_success_fails_if_that_was_asked_for(fails: bool, failed: int) -> None:
    progress = progress_of(2, fail_on_partial_success=fails)
    add(progress, "partial-succeeded")
    assert progress.failed_rows == failed
    assert progress.has_failed is fails


@pytest.mark.parametrize(
    ("allowed", "total", "count"),
    [
        (0, 1000, 0),
        (3, 2, 3),
        (0.05, 1000, 50),
        (0.05, 19, 0),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (1.0, 10, 10),
        (0.0, 9, 0),
    ],
)
def test_a_limit_is_a_number_or_a_share(allowed: float, total: int, count: int) -> None:
    assert FailureLimit(allowed).allowed(total) == count


@pytest.mark.parametrize("value", [-1, -0.1, 1.5, True, "5", None, float("nan"), float("inf")])
def test_a_limit_that_is_neither_is_refused(value: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="max_failed_runs"):
        FailureLimit(value)


def test_a_batch_beyond_its_limit_fails_with_its_most_frequent_errors() -> None:
    progress = progress_of(100, 2, output_path="results.jsonl")
    add(progress, "succeeded", "succeeded")
    add(progress, "failed", error="rare\nand odd")
    for number in range(5):
        add(progress, "failed", error=f"Rate limit, try again in {number} s (request {RUN})")
    add(progress, "failed", "failed", error="no such model")
    add(progress, "failed", "failed", error="no memory")
    add(progress, "failed", error=None)
    assert progress.has_failed
    with pytest.raises(DifyBatchFailed) as failure:
        progress.raise_if_failed(1010)
    within = progress_of(4, 0.5)
    add(within, "failed", "failed", "succeeded", "succeeded")
    within.raise_if_failed(0)
    text = str(failure.value)
    assert text.startswith(
        "11 of 100 runs failed (max_failed_runs is 2). Most frequent errors: 5 times 'Rate limit, try "
    )
    assert f"(first in row 3, run {RUN}); 2 times 'no such model' (first in row 8" in text
    assert "2 times 'no memory'" in text
    assert "rare" not in text
    assert text.endswith("87 rows were not run. The results are in results.jsonl.")
    assert "\n" not in text
    assert pickle.loads(pickle.dumps(failure.value)).summary == progress.summary(1010)


def test_a_million_different_errors_take_no_memory() -> None:
    progress = progress_of(10**6)
    for row in range(5000):
        word = "".join(chr(97 + (row // 26**place) % 26) for place in range(4))
        progress.add(RowResult(row, "failed", error=f"{word} is wrong " * 1000))
    assert len(progress._errors) <= 200
    assert progress.failed_rows == 5000
    assert len(progress.describe_errors()) < 1000


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (9500, "9,500"), (12_345, "12.3 k"), (1_240_000, "1.2 M"), (3e9, "3.0 G")]
)
def test_a_number_is_short(number: float, text: str) -> None:
    assert short_number(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (40.4, "40 s"), (170, "3 min"), (9000, "2.5 h")])
def test_a_time_is_short(seconds: float, text: str) -> None:
    assert short_time(seconds) == text
    assert re.fullmatch(r"[\d.]+ \w+", text)
