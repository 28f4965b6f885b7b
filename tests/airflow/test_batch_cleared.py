"""A batch task that is cleared starts from scratch: no row's run, part or result of before is taken for a new one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.airflow.airflow_processes import AIRFLOW_3_0
from tests.airflow.airflow_runs import DagRunResult, run_dag
from tests.dify_stand_in import DifyStandIn, Start, respond

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

ROWS = 6


def run_and_clear(**arguments: Any) -> DagRunResult:
    """Run a Dag of one batch ``run``, clear it once when it is over, and let it run again."""
    arguments = {
        "inputs": [{"n": n} for n in range(ROWS)],
        "max_active_runs": 2,
        "poll_interval": 0.05,
        "not_found_grace": 0.2,
        "retry_delay": 0.0,
        **arguments,
    }
    return run_dag(
        f"""
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        run = DifyRunWorkflowBatchOperator(task_id="run", on_failure_callback=raised, **{arguments!r})

        @task(trigger_rule="all_done")
        def clear_once(ti=None):
            clear_task(dag, ti, "run")

        run >> clear_once()
        """
    )


def results_of(result: DagRunResult, output: Path | None) -> list[dict[str, Any]]:
    if output is None:
        returned: list[dict[str, Any]] = result.xcoms["run"]["return_value"]
        return returned
    return [json.loads(line) for line in output.read_text().splitlines()]


def rows_and_generations(dify: DifyStandIn) -> list[tuple[int, str]]:
    """Return each start's row, and what its user has in front of that."""
    return [(started.inputs["n"], started.user.rpartition("/")[0]) for started in dify.started]


# Clearing gives the task its retries once more; here Airflow 3.0 does as if the Dag were gone.
RETRIES = pytest.mark.skipif(AIRFLOW_3_0, reason="Airflow 3.0 clears a task of dag.test() without a look at its Dag")


@pytest.mark.parametrize(("has_file", "retries"), [(True, 0), pytest.param(False, 2, marks=RETRIES)])
def test_a_batch_that_succeeded_and_is_cleared_runs_all_rows_again(
    dify: DifyStandIn, tmp_path: Path, has_file: bool, retries: int
) -> None:
    output = tmp_path / "results.jsonl" if has_file else None
    dify.starts += [Start(fields={"outputs": {"answer": n}}) for n in range(2 * ROWS)]
    result = run_and_clear(output_path=str(output) if output else None, retries=retries)
    assert (result.state, result.tries["run"]) == ("success", 2)
    rows = rows_and_generations(dify)
    assert sorted(row for row, _ in rows[:ROWS]) == sorted(row for row, _ in rows[ROWS:]) == list(range(ROWS))
    assert len({user for _, user in rows[:ROWS]} | {user for _, user in rows[ROWS:]}) == 2
    results = results_of(result, output)
    assert [row["index"] for row in results] == list(range(ROWS))
    assert sorted(row["outputs"]["answer"] for row in results) == list(range(ROWS, 2 * ROWS))
    assert result.xcoms["run"]["batch"]["succeeded"] == ROWS
    if output:
        assert [path.name for path in tmp_path.iterdir()] == [output.name]


@pytest.mark.parametrize("retries", [0, pytest.param(1, marks=RETRIES)])
def test_a_batch_that_broke_off_and_is_cleared_runs_all_rows_again(
    dify: DifyStandIn, tmp_path: Path, retries: int
) -> None:
    output = tmp_path / "results.jsonl"
    # Two rows are over when Dify is away, so that the next one's run can't be asked for; parts stay for a retry.
    broken = Start(statuses=("running", "succeeded"), cut="workflow_started")
    dify.starts += [Start(), Start(), *[broken] * (1 + retries)]
    dify.misbehave(*[respond(503)] * 2 * (1 + retries), only="GET .*/(workflows/run/|info)")
    result = run_and_clear(
        output_path=str(output), max_active_runs=1, retries=retries, max_consecutive_failures=0, poll_interval=0.2
    )
    assert (result.state, result.tries["run"]) == ("success", 2 + retries)
    assert len(result.raised["run"]) == 1
    rows = rows_and_generations(dify)
    again = [row for row, user in rows if user == rows[-1][1]]
    assert again == list(range(ROWS))
    results = results_of(result, output)
    runs = {started.workflow_run_id for started in dify.started[-ROWS:]}
    assert [row["index"] for row in results] == list(range(ROWS))
    assert {row["workflow_run_id"] for row in results} == runs
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
