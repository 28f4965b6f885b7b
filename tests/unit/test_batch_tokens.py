"""A ceiling on the tokens of a batch, over real HTTP."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.batch.row import BatchSettings
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyTokenLimitReached
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator
from tests.dify_stand_in import DifyStandIn, Start
from tests.unit.batches import lines_of, numbered, settings_for, task_of

pytestmark = pytest.mark.usefixtures("dify_connection")

ROWS, ACTIVE, TOKENS = 12, 2, 100
SETTINGS = settings_for(numbered(ROWS), max_active_runs=ACTIVE, max_total_tokens=5 * TOKENS)


def run_try(settings: BatchSettings, try_number: int = 1) -> dict[str, Any]:
    """Run a try, and return the batch's last summary, also of one that has reached its limit."""
    summaries: list[dict[str, Any]] = []
    task = task_of(settings, summaries.append, try_number=try_number)
    try:
        task.run(lambda app_id: None)
    except DifyTokenLimitReached as error:
        summaries[-1]["said"] = str(error)
    return summaries[-1]


@pytest.fixture
def each_takes_100(dify: DifyStandIn) -> None:
    dify.run_duration = 0.05
    dify.starts.extend(Start(fields={"total_tokens": TOKENS}) for _ in range(3 * ROWS))


@pytest.fixture(params=[True, False], ids=["a-file", "a-return-value"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> BatchSettings:
    return replace(SETTINGS, output_path=str(tmp_path / "results.jsonl") if request.param else None)


@pytest.mark.usefixtures("each_takes_100")
def test_no_row_is_started_once_the_runs_have_used_more_tokens_and_a_retry_with_a_higher_limit_continues(
    dify: DifyStandIn, settings: BatchSettings
) -> None:
    summary = run_try(settings)
    # The sixth run is over the limit, and others were under way.
    assert 6 <= len(dify.started) <= 6 + ACTIVE
    assert summary["total_tokens"] == len(dify.started) * TOKENS
    assert summary["succeeded"] == len(dify.started)
    left = ROWS - len(dify.started)
    assert f"have used {summary['total_tokens']} tokens (max_total_tokens is 500)" in summary["said"]
    assert f"{left} of {ROWS} rows were not run" in summary["said"]
    started = len(dify.started)
    again = run_try(settings, try_number=2)
    if settings.output_path is not None:
        assert (again["succeeded"], len(dify.started)) == (started, started)
    continued = run_try(replace(settings, max_total_tokens=ROWS * TOKENS), try_number=2)
    assert continued["succeeded"] == ROWS
    assert sorted(run.inputs["n"] for run in dify.started) == list(range(ROWS))


@pytest.mark.usefixtures("each_takes_100")
def test_the_last_try_writes_the_results_that_there_are(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    run_try(replace(SETTINGS, output_path=str(output), retries=0), try_number=2)
    assert [row["index"] for row in lines_of(output)] == list(range(len(dify.started)))


@pytest.mark.usefixtures("each_takes_100")
def test_a_batch_whose_last_rows_reach_the_limit_succeeds(settings: BatchSettings) -> None:
    summary = run_try(replace(settings, max_total_tokens=ROWS * TOKENS - 1))
    assert (summary["succeeded"], summary.get("said")) == (ROWS, None)


def test_the_tokens_of_a_run_that_is_started_again_count(
    dify: DifyStandIn, settings: BatchSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", 0.001)
    dify.starts.extend(
        Start(name, fields={"total_tokens": TOKENS}) for name in ("run_streaming_failed", "run_streaming_echo") * ROWS
    )
    summary = run_try(replace(settings, max_total_tokens=20 * TOKENS, run_retries=9, max_active_runs=1))
    assert summary["total_tokens"] == len(dify.started) * TOKENS
    assert 20 < len(dify.started) < 2 * ROWS


@pytest.mark.parametrize("limit", [-1, 1.5, True, "1000"])
def test_a_limit_that_is_no_number_of_tokens_is_refused_when_the_dag_is_parsed(limit: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="max_total_tokens must be a whole number"):
        DifyRunWorkflowBatchOperator(task_id="run", inputs=[], max_total_tokens=limit)
