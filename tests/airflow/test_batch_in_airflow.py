"""What a user of the batch sees in Airflow: results, counts, messages, and what Dify was asked to do."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.exceptions import (
    DifyAuthenticationError,
    DifyBatchFailed,
    DifyConfigurationError,
    DifyConnectionError,
    DifyWorkflowRunTimeout,
)
from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator
from tests.airflow.airflow_runs import DagRunResult, error_of, run_dag, without_masking
from tests.combinations import pairs
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    Start,
    form_field,
    rejects,
    replay,
    respond,
)

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let retries of a run and of a refused start follow each other at once."""
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", 0.01)
    monkeypatch.setattr("airflow_provider_dify.batch.slots.FIRST_PAUSE", 0.05)


def run_batch(**arguments: Any) -> DagRunResult:
    """Run a Dag of one batch ``run`` with these arguments, and a task that gets its return value and its counts."""
    arguments = {"poll_interval": 0.05, "not_found_grace": 1.0, **arguments}
    return run_dag(
        f"""
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        run = DifyRunWorkflowBatchOperator(task_id="run", on_failure_callback=raised, **{arguments!r})

        @task
        def use(results, counts):
            received("results", results)
            received("counts", counts)

        use(run.output, run.output["batch"])
        """
    )


@contextlib.contextmanager
def once(is_met: Callable[[], bool], act: Callable[[], None]) -> Iterator[None]:
    """Do something as soon as something is so, while a batch runs."""
    is_over = threading.Event()

    def watch() -> None:
        while not is_over.wait(0.02):
            if is_met():
                act()
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def numbered(count: int) -> list[dict[str, Any]]:
    return [{"n": number} for number in range(count)]


def echo(dify: DifyStandIn, count: int, **arguments: Any) -> None:
    """Let the next starts succeed, each with an output of its own."""
    dify.starts += [Start(fields={"outputs": {"answer": n}, "total_tokens": 10}, **arguments) for n in range(count)]


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.usefixtures("dialect")
def test_each_row_has_a_run_and_the_results_are_in_row_order(dify: DifyStandIn) -> None:
    echo(dify, 12)
    result = run_batch(inputs=numbered(12), max_active_runs=4)
    assert result.state == "success"
    results = result.received["results"]
    assert [row["index"] for row in results] == list(range(12))
    assert {row["status"] for row in results} == {"succeeded"}
    runs = {started.workflow_run_id: started.inputs for started in dify.started}
    assert [runs[row["workflow_run_id"]] for row in results] == numbered(12)
    counts = result.received["counts"]
    assert (counts["total"], counts["succeeded"], counts["failed"], counts["total_tokens"]) == (12, 12, 0, 120)
    assert counts["output_path"] is None
    # One user for each run, which names its row.
    assert sorted(int(started.user.rpartition("/")[2].partition(".")[0]) for started in dify.started) == list(range(12))


def test_no_more_runs_than_may_are_active_and_they_start_in_row_order(dify: DifyStandIn) -> None:
    # It would turn a fourth one away.
    dify.active_runs_limit = 3
    echo(dify, 20, duration=0.1)
    result = run_batch(inputs=numbered(20), max_active_runs=3)
    assert result.state == "success"
    assert sum(request.method == "POST" for request in dify.requests) == 20
    order = [started.inputs["n"] for started in dify.started]
    assert all(abs(place - number) < 3 for place, number in enumerate(order))


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_rows_of_a_file_become_a_file_of_results(dify: DifyStandIn, tmp_path: Path, suffix: str) -> None:
    rows = tmp_path / f"rows.{suffix}"
    if suffix == "csv":
        rows.write_text("n,text\n" + "".join(f'{n},"ä, {n}"\n' for n in range(30)))
    else:
        rows.write_text("".join(json.dumps({"n": n, "text": f"ä, {n}"}) + "\n" for n in range(30)))
    echo(dify, 30)
    output = tmp_path / "out" / "results.jsonl"
    result = run_batch(inputs=f"file://{rows}", output_path=f"file://{output}")
    assert result.state == "success"
    assert result.received["results"] == f"file://{output}"
    results = lines_of(output)
    assert [row["index"] for row in results] == list(range(30))
    assert sorted(str(started.inputs["n"]) for started in dify.started) == sorted(map(str, range(30)))
    assert {started.inputs["text"] for started in dify.started} == {f"ä, {n}" for n in range(30)}
    assert [path.name for path in output.parent.iterdir()] == ["results.jsonl"]


def test_a_row_that_is_no_object_is_a_failed_row_with_its_line(dify: DifyStandIn, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"n": 0}\n[1]\n{"n": 2}\n')
    result = run_batch(inputs=str(rows), max_failed_runs=1)
    assert result.state == "success"
    assert [row["status"] for row in result.received["results"]] == ["succeeded", "failed", "succeeded"]
    assert "Line 2 is no object" in result.received["results"][1]["error"]
    assert len(dify.started) == 2


def csv_of(folder: Path, text: str) -> str:
    (folder / "rows.csv").write_text(text)
    return str(folder / "rows.csv")


FORM = [
    form_field("query", required=True),
    form_field("mode", "select", options=("fast", "exact")),
    form_field("meta", "json_object"),
    form_field("count", "number"),
]


@pytest.mark.parametrize("has_form", [True, False])
def test_an_empty_cell_of_csv_is_left_out(dify: DifyStandIn, tmp_path: Path, has_form: bool) -> None:
    if has_form:
        dify.user_input_form = FORM
    else:
        dify.misbehave_always(respond(500), "GET .*/parameters")
    rows = csv_of(tmp_path, "query,mode,meta\nhello,,\n")
    result = run_batch(inputs=rows, json_columns=["meta"])
    assert result.state == "success"
    assert [started.inputs for started in dify.started] == [{"query": "hello"}]


def test_json_columns_of_csv_and_texts_of_numbers_become_inputs_and_what_cannot_fails_its_row(
    dify: DifyStandIn, tmp_path: Path
) -> None:
    dify.user_input_form = FORM
    rows = csv_of(tmp_path, 'query,meta,count\na,"{""tags"": [1]}",12\nb,oops,3\nc,[1],1\nd,,x\n,,1\n')
    result = run_batch(inputs=rows, json_columns=["meta"], max_failed_runs=4)
    assert result.state == "success"
    assert [started.inputs for started in dify.started] == [{"query": "a", "meta": {"tags": [1]}, "count": "12"}]
    errors = [row["error"] for row in result.received["results"]]
    assert "Line 3 has no JSON in the column 'meta'" in errors[1]
    assert "Input 'meta' must be an object, not a list." in errors[2]
    assert "Input 'count' must be a number, not 'x'." in errors[3]
    assert "Input 'query' is required and missing." in errors[4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(
            ({"json_columns": columns}, "must be a list of column names")
            for columns in ("meta", [1], {"meta": 1}, [""])
        ),
        *(({"max_active_runs": count}, "must be a whole number from 1 to 1,000") for count in (0, 1001, 10**9)),
    ],
)
def test_arguments_that_cannot_work_are_refused_when_the_dag_is_parsed(arguments: Any, message: str) -> None:
    with pytest.raises(DifyConfigurationError, match=f"{next(iter(arguments))} {message}"):
        DifyRunWorkflowBatchOperator(task_id="run", inputs=[], **arguments)
    DifyRunWorkflowBatchOperator(task_id="run", inputs=[], max_active_runs=1000)


def test_rows_are_checked_against_the_form_which_is_read_once(dify: DifyStandIn) -> None:
    dify.user_input_form = [form_field("query", required=True)]
    rows = [{"query": "a"}, {}, {"query": "b"}, {"query": None}]
    result = run_batch(inputs=rows, max_failed_runs=0.5)
    assert result.state == "success"
    assert [row["attempts"] for row in result.received["results"]] == [1, 0, 1, 0]
    assert "The app's form in Dify says so" in result.received["results"][1]["error"]
    assert len(dify.started) == 2
    assert sum("/parameters" in request.path for request in dify.requests) == 1


def test_a_run_that_fails_is_started_again_and_its_last_error_counts(dify: DifyStandIn) -> None:
    dify.starts += [Start("run_streaming_failed"), Start("run_streaming_failed"), Start()]
    result = run_batch(inputs=numbered(1), run_retries=2)
    assert result.state == "success"
    (row,) = result.received["results"]
    assert (row["status"], row["attempts"]) == ("succeeded", 3)
    assert len({started.user for started in dify.started}) == 3


def test_too_many_failed_runs_fail_the_task_and_nothing_more_is_started(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    dify.starts += [Start("run_streaming_failed") for _ in range(40)]
    result = run_batch(inputs=numbered(40), max_failed_runs=2, max_active_runs=2, output_path=str(output), retries=3)
    error = error_of(result)
    assert isinstance(error, DifyBatchFailed)
    assert "of 40 runs failed (max_failed_runs is 2). Most frequent errors:" in str(error)
    assert "rows were not run" in str(error)
    assert 3 <= len(dify.started) <= 5
    assert result.tries["run"] == 1
    assert len(lines_of(output)) == len(dify.started)
    counts = result.xcoms["run"]["batch"]
    assert (counts["failed"], counts["output_path"]) == (len(dify.started), str(output))


def test_dify_that_has_too_many_runs_gets_fewer_and_no_row_fails(dify: DifyStandIn) -> None:
    dify.active_runs_limit = 3
    echo(dify, 20, duration=0.1)
    result = run_batch(inputs=numbered(20), max_active_runs=10)
    assert result.state == "success"
    assert {row["status"] for row in result.received["results"]} == {"succeeded"}
    assert len(dify.started) == 20


def test_events_that_break_off_and_polls_that_fail_cost_a_retry(dify: DifyStandIn) -> None:
    dify.starts += [
        Start(statuses=("running", "succeeded"), cut="workflow_started", then=then) for then in ("close", "reset") * 3
    ]
    dify.misbehave(respond(503), times=4, only="GET .*/workflows/run/")
    result = run_batch(inputs=numbered(6))
    assert result.state == "success"
    assert len(dify.started) == 6


@pytest.mark.parametrize("dialect", ["1.16.1"], indirect=True)
def test_inputs_that_dify_rejects_fail_the_row_without_a_retry(dify: DifyStandIn, dialect: str) -> None:
    dify.misbehave(replay("run_streaming_missing_input"), only="POST .*/run")
    result = run_batch(inputs=numbered(3), max_active_runs=1, max_failed_runs=1, run_retries=2)
    assert result.state == "success"
    assert "query is required" in result.received["results"][0]["error"]
    assert len(dify.started) == 2


def test_a_batch_that_takes_too_long_stops_what_runs(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    dify.starts += [Start(), *(Start(statuses=("running",), cut="workflow_started", then="pings") for _ in range(5))]
    result = run_batch(inputs=numbered(6), max_active_runs=2, timeout=1, output_path=str(output), retries=2)
    error = error_of(result)
    assert isinstance(error, DifyWorkflowRunTimeout)
    assert "The batch's timeout of 1 seconds is over. 1 of 6 runs are over" in str(error)
    assert {task_id for task_id, _ in dify.stopped} == {started.task_id for started in dify.started[1:]}
    assert [row["status"] for row in lines_of(output)] == ["succeeded"]


def test_more_rows_than_a_return_value_takes_are_refused_before_anything_is_started(dify: DifyStandIn) -> None:
    result = run_batch(inputs=numbered(1001))
    error = error_of(result)
    assert isinstance(error, DifyConfigurationError)
    assert "Set output_path" in str(error)
    assert dify.requests == []


def test_the_key_is_in_no_log_xcom_or_result(
    dify: DifyStandIn, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "results.jsonl"
    dify.misbehave(rejects(400, "x", f"bad {API_KEY}"), only="POST .*/run")
    result = run_batch(inputs=numbered(3), max_failed_runs=3, output_path=str(output))
    assert result.state == "success"
    assert "bad ***" in output.read_text()
    everything = without_masking("".join(capfd.readouterr()) + caplog.text) + output.read_text() + repr(result.xcoms)
    assert API_KEY not in everything


def test_rows_come_from_an_upstream_task(dify: DifyStandIn) -> None:
    result = run_dag(
        """
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        @task
        def rows():
            return [{"n": n} for n in range(3)]

        DifyRunWorkflowBatchOperator(task_id="run", inputs=rows(), user="team {{ dag.dag_id }}")
        """
    )
    assert result.state == "success"
    assert [started.inputs for started in dify.started] == numbered(3)
    assert all(started.user.startswith("team dag_") for started in dify.started)


def test_rows_come_from_mapped_tasks(dify: DifyStandIn) -> None:
    # Their results are a lazy sequence, which Airflow reads from its database.
    result = run_dag(
        """
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        @task
        def row(n):
            return {"n": n}

        DifyRunWorkflowBatchOperator(task_id="run", inputs=row.expand(n=[0, 1, 2]), max_active_runs=1)
        """
    )
    assert result.state == "success"
    assert [started.inputs for started in dify.started] == numbered(3)


def test_no_rows_are_a_batch_too(dify: DifyStandIn) -> None:
    result = run_batch(inputs=[])
    assert result.state == "success"
    assert result.received["results"] == []
    assert dify.started == []


# --- a run whose record can't be read

BROKEN = '{"code": "unknown", "message": "Internal Server Error", "status": 500}'


@pytest.mark.parametrize(("dialect", "max_failed_runs"), pairs(["1.13.0", "1.16.1"], [0, 1]), indirect=["dialect"])
def test_a_run_whose_record_can_not_be_read_fails_its_row_alone(
    dify: DifyStandIn, dialect: str, tmp_path: Path, max_failed_runs: int
) -> None:
    output = tmp_path / "results.jsonl"
    echo(dify, 20)
    dify.starts[7] = Start(statuses=("running",), cut="workflow_started")
    dify.misbehave_always(respond(500, BROKEN), only="GET .*/workflows/run/")
    result = run_batch(
        inputs=numbered(20),
        max_active_runs=8,
        max_failed_runs=max_failed_runs,
        output_path=str(output),
        retries=2,
        retry_delay=0.0,
    )
    assert result.states["run"] == ("success" if max_failed_runs else "failed")
    assert result.tries["run"] == 1
    results = lines_of(output)
    assert [row["index"] for row in results] == list(range(20))
    (failed,) = [row for row in results if row["status"] != "succeeded"]
    (broken,) = [started for started in dify.started if started.workflow_run_id == failed["workflow_run_id"]]
    assert broken.inputs == {"n": failed["index"]}
    assert broken.workflow_run_id in failed["error"]
    assert "other requests succeed" in failed["error"]
    assert len(dify.started) == 20
    assert dify.stopped == []


def test_a_record_that_can_be_read_again_when_dify_is_back_is_no_failed_row(dify: DifyStandIn) -> None:
    dify.starts.append(Start(statuses=("running", "succeeded"), cut="workflow_started"))
    # Dify comes back between the last poll that may fail, and the look whether it responds at all.
    dify.misbehave(respond(503), times=3, only="GET .*/workflows/run/")
    result = run_batch(inputs=numbered(1), max_consecutive_failures=2)
    assert result.state == "success"
    assert result.received["results"][0]["status"] == "succeeded"


# --- what ends a batch for good


def broken_off(dify: DifyStandIn) -> None:
    """Let two rows succeed, and the third one's run can't be asked about, with all of Dify away."""
    dify.starts += [Start(), Start(), Start(statuses=("running",), cut="workflow_started")]
    dify.misbehave_always(respond(503), only="GET .*/(workflows/run/|info)")


def test_the_last_try_writes_the_results_that_are_there(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    broken_off(dify)
    result = run_batch(
        inputs=numbered(6),
        max_active_runs=1,
        # Dify that is away ends the try, and not the row.
        max_failed_runs=6,
        max_consecutive_failures=0,
        retry_delay=0.0,
        output_path=str(output),
        retries=1,
    )
    assert (result.states["run"], result.tries["run"]) == ("failed", 2)
    assert isinstance(result.raised["run"][-1], DifyConnectionError)
    assert [(row["index"], row["status"]) for row in lines_of(output)] == [(0, "succeeded"), (1, "succeeded")]
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]
    assert len(dify.started) == 3


# --- retries and kills


@pytest.mark.parametrize("with_file", [True, False])
@pytest.mark.usefixtures("dialect")
def test_a_retry_goes_on_with_what_the_first_try_has_started(
    dify: DifyStandIn, tmp_path: Path, with_file: bool
) -> None:
    output = tmp_path / "results.jsonl"
    # Two rows are over, the third is alive when Dify can't be asked about it.
    dify.starts += [
        Start(fields={"outputs": {"n": 0}}),
        Start(fields={"outputs": {"n": 1}}),
        Start(statuses=("running", "running", "succeeded"), fields={"outputs": {"n": 2}}, cut="workflow_started"),
    ]
    dify.misbehave(respond(503), times=4, only="GET .*/(workflows/run/|info)")
    result = run_batch(
        inputs=numbered(8),
        max_active_runs=1,
        max_consecutive_failures=0,
        retries=2,
        retry_delay=0.0,
        output_path=str(output) if with_file else None,
    )
    assert result.state == "success"
    assert result.tries["run"] > 1
    # Each once; a row that may have been under way is looked for first, while others start.
    assert sorted(started.inputs["n"] for started in dify.started) == list(range(8))
    results = lines_of(output) if with_file else result.received["results"]
    assert [row["index"] for row in results] == list(range(8))
    assert {row["status"] for row in results} == {"succeeded"}


def test_a_batch_that_is_killed_stops_its_runs_and_starts_no_more(dify: DifyStandIn) -> None:
    dify.starts += [Start(statuses=("running",), cut="workflow_started", then="pings") for _ in range(10)]
    try:
        # Airflow kills a task whose execution_timeout is over; these runs would never be.
        result = run_batch(inputs=numbered(10), max_active_runs=4, execution_timeout=timedelta(seconds=2))
        assert result.states["run"] == "failed"
    except BaseException as error:
        # Airflow 2 lets it out of dag.test().
        assert type(error).__name__ == "AirflowTaskTimeout"  # noqa: PT017
    assert len(dify.started) == 4
    assert sorted(dify.stopped) == sorted((started.task_id, started.user) for started in dify.started)


@pytest.mark.parametrize("has_file", [True, False])
def test_a_retry_that_finds_no_parts_finds_the_runs_in_the_log(
    dify: DifyStandIn, tmp_path: Path, has_file: bool
) -> None:
    echo(dify, 12)
    output = str(tmp_path / "results.jsonl") if has_file else None
    result = run_dag(
        f"""
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        def fail_once(context, result=None):
            # The worker dies when all is done, and before Airflow knows.
            if context["ti"].try_number == 1:
                raise RuntimeError("The worker is gone.")

        DifyRunWorkflowBatchOperator(
            task_id="run",
            inputs={numbered(6)!r},
            output_path={output!r},
            not_found_grace=0.2,
            retries=1,
            retry_delay=datetime.timedelta(0),
            post_execute=fail_once,
        )
        """
    )
    assert result.state == "success"
    assert result.tries["run"] == 2
    assert [started.inputs["n"] for started in dify.started] == list(range(6))
    results = lines_of(Path(output)) if output else result.xcoms["run"]["return_value"]
    assert sorted(row["outputs"]["answer"] for row in results) == list(range(6))
    assert result.xcoms["run"]["batch"]["succeeded"] == 6


@pytest.mark.usefixtures("dialect")
def test_a_run_that_succeeded_costs_dify_one_request(dify: DifyStandIn) -> None:
    echo(dify, 5)
    dify.starts.append(Start("run_streaming_failed"))
    result = run_batch(inputs=numbered(6), max_active_runs=2, max_failed_runs=1)
    # Two rows are started at once, and either may come first.
    (failed,) = [row for row in result.received["results"] if row["status"] == "failed"]
    good = [row for row in result.received["results"] if row is not failed]
    assert sorted(row["outputs"]["answer"] for row in good) == list(range(5))
    assert [row["total_tokens"] for row in good] == [10] * 5
    details = [request.path for request in dify.requests if "/workflows/run/" in request.path]
    # Only that of the run that failed.
    assert details == [f"/v1/workflows/run/{failed['workflow_run_id']}"]


# --- Dify that queues, stalls, or refuses the key


def test_runs_that_dify_queues_are_waited_for(dify: DifyStandIn, dialect: str) -> None:
    if not dify.dialect_rules.queues_starts:
        pytest.skip("this Dify queues no runs")
    dify.slots = 2
    dify.run_duration = 0.2
    result = run_batch(inputs=numbered(10), max_active_runs=6)
    assert result.state == "success"
    assert len(dify.started) == 10


def test_a_key_that_is_rotated_meanwhile_is_read_again(dify: DifyStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    new_key = f"{API_KEY}-new"

    def rotate() -> None:
        fields = {"conn_type": "dify", "host": dify.base_url, "password": new_key}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(fields))
        dify.api_keys = {new_key}

    dify.starts += [Start(duration=0.2) for _ in range(8)]
    with once(lambda: len(dify.started) >= 4, rotate):
        # No poll comes in between: starts have to notice.
        result = run_batch(inputs=numbered(12), max_active_runs=2, poll_interval=10)
    assert result.state == "success"
    assert dify.api_keys == {new_key}
    assert len(dify.started) == 12


def test_a_key_that_is_revoked_ends_the_batch_without_a_retry(dify: DifyStandIn, tmp_path: Path) -> None:
    output = tmp_path / "results.jsonl"
    dify.run_duration = 0.1
    with once(lambda: len(dify.started) >= 8, dify.api_keys.clear):
        result = run_batch(
            inputs=numbered(300), max_active_runs=2, output_path=str(output), retries=3, max_failed_runs=9
        )
    assert result.states["run"] == "failed"
    assert result.tries["run"] == 1
    assert isinstance(result.raised["run"][0], DifyAuthenticationError)
    assert 0 < len(lines_of(output)) <= len(dify.started) < 300
