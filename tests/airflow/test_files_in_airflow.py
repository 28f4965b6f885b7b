"""Files in and out of a Dag's tasks: in each way to wait, on a retry, and in a batch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.airflow_versions import CAN_END_FROM_TRIGGER, CAN_START_FROM_TRIGGER
from airflow_provider_dify.exceptions import (
    DifyBatchFailed,
    DifyConfigurationError,
    DifyFilesError,
    DifyFilesLost,
    DifyInputsRejected,
)
from airflow_provider_dify.runs.uploads import RETRIES
from airflow_provider_dify.triggers.dify import DifyWorkflowRunTrigger
from tests.airflow.airflow_runs import DagRunResult, run_dag, run_sensor
from tests.combinations import each_or_long
from tests.dify_stand_in import DifyStandIn, form_field, rejects, respond
from tests.dify_stand_in.runs import Run

pytestmark = pytest.mark.usefixtures("airflow_db", "dify_connection", "quick_retries")

WAYS: dict[str, dict[str, Any]] = {
    "worker": {},
    "deferrable": {"deferrable": True},
    "end_from_trigger": {"end_from_trigger": True},
    "start_from_trigger": {"start_from_trigger": True},
    "reschedule": {"mode": "reschedule"},
}
OF_OPERATOR = ["worker", "deferrable", *(["end_from_trigger"] if CAN_END_FROM_TRIGGER else [])]
OF_SENSOR = [*OF_OPERATOR, "reschedule", *(["start_from_trigger"] if CAN_START_FROM_TRIGGER else [])]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch, dify: DifyStandIn) -> None:
    """Retry transfers at once, and let each run return its files, in upper case."""
    monkeypatch.setattr("airflow_provider_dify.runs.uploads.RETRY_DELAY", 0.01)
    monkeypatch.setattr("airflow_provider_dify.batch.row.RETRY_DELAY", 0.01)

    def outputs_of(run: Run) -> dict[str, Any]:
        files = [item["upload_file_id"] for item in run.inputs.values() if isinstance(item, dict)]
        made = [dify.files.make(f"new {dify.uploads[id_][0]}", dify.uploads[id_][1].upper()) for id_ in files]
        return {"text": "hello", "files": made}

    dify.outputs_of = outputs_of
    dify.echoes_inputs = True


@pytest.fixture
def inbox(tmp_path: Path) -> Path:
    folder = tmp_path / "inbox"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.txt").write_text(f"text of {name}")
    return folder


def run_operator(arguments: str, operator: str = "DifyRunWorkflowOperator") -> DagRunResult:
    return run_dag(
        f"""
        from airflow_provider_dify.files import DifyFile
        from airflow_provider_dify.operators.dify_batch import DifyRunWorkflowBatchOperator

        run = {operator}(
            task_id="run", poll_interval=0.05, retry_delay=datetime.timedelta(0), on_failure_callback=raised,
            on_retry_callback=raised, {arguments}
        )

        @task
        def use(outputs):
            received("outputs", outputs)

        use(run.output)
        """
    )


def run_batch(arguments: str) -> DagRunResult:
    return run_operator(f"not_found_grace=1, {arguments}", "DifyRunWorkflowBatchOperator")


def downloads_of(dify: DifyStandIn) -> int:
    return len([request for request in dify.requests if request.path.startswith("/files")])


@pytest.mark.parametrize("way", OF_OPERATOR)
def test_a_file_goes_in_and_its_result_comes_out(dify: DifyStandIn, inbox: Path, tmp_path: Path, way: str) -> None:
    dify.run_duration = 0.2
    result = run_operator(
        f"inputs={{'report': DifyFile('{inbox}/{{{{ \"a\" }}}}.txt'), 'n': 1}}, defer_after=0, "
        f"output_files='{tmp_path}/out/{{{{ run_id }}}}/', **{WAYS[way]}"
    )
    assert result.state == "success"
    ((file_id, uploaded),) = dify.uploads.items()
    assert uploaded == ("a.txt", b"text of a")
    assert dify.upload_users[file_id] == dify.started[0].user
    (file,) = result.received["outputs"]["files"]
    assert Path(file["path"]).read_bytes() == b"TEXT OF A"
    assert file["path"].startswith(f"{tmp_path}/out/manual__")
    assert file["path"].endswith("/new a.txt")
    assert file["filename"] == "new a.txt"
    assert result.xcoms["run"]["files"] == [file]


@pytest.mark.parametrize("way", OF_SENSOR)
def test_the_sensor_saves_files_in_each_way_to_wait(dify: DifyStandIn, tmp_path: Path, way: str) -> None:
    run_id = dify.add_run("running", "succeeded", outputs={"file": dify.files.make("a.txt", b"x")})
    arguments = {"mode": "reschedule", "poke_interval": 60.0} if way == "reschedule" else WAYS[way]
    if way == "reschedule":
        run_id = dify.add_run("succeeded", outputs={"file": dify.files.make("a.txt", b"x")})
    result = run_sensor(workflow_run_id=run_id, output_files=str(tmp_path / "{{ 'out' }}"), **arguments)
    assert result.state == "success"
    assert result.received["outputs"]["file"]["path"] == f"{tmp_path}/out/a.txt"
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"x"


def test_mapped_tasks_have_a_file_each(dify: DifyStandIn, inbox: Path) -> None:
    result = run_dag(
        f"""
        from airflow_provider_dify.files import DifyFile

        @task
        def names():
            return ["a", "b"]

        mapped = DifyRunWorkflowOperator.partial(
            task_id="mapped", poll_interval=0.05, output_files="{inbox}/out/{{{{ ti.map_index }}}}"
        ).expand(inputs=names().map(lambda name: {{"report": DifyFile(f"{inbox}/{{name}}.txt")}}))
        templated = DifyRunWorkflowOperator.partial(
            task_id="templated", inputs={{"report": DifyFile("{inbox}/{{{{ 'ab'[ti.map_index] }}}}.txt")}}
        ).expand(workflow_id=["2d7a7544-770c-496f-8ef9-4e622682b330"] * 2)
        mapped >> templated
        """
    )
    assert result.state == "success"
    assert sorted(name for name, _ in dify.uploads.values()) == ["a.txt", "a.txt", "b.txt", "b.txt"]
    assert (inbox / "out" / "1" / "new b.txt").read_text() == "TEXT OF B"


def test_a_deferred_task_carries_neither_files_nor_where_they_go_to_the_triggerer(
    dify: DifyStandIn, inbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    carried: list[Any] = []
    run = DifyWorkflowRunTrigger.run

    def note(trigger: DifyWorkflowRunTrigger) -> Any:
        carried.append(trigger.serialize())
        return run(trigger)

    monkeypatch.setattr(DifyWorkflowRunTrigger, "run", note)
    dify.run_duration = 0.2
    result = run_operator(
        f"inputs={{'report': DifyFile('{inbox}/a.txt')}}, defer_after=0, end_from_trigger={CAN_END_FROM_TRIGGER}, "
        f"deferrable=True, output_files='{tmp_path}/out'"
    )
    assert result.state == "success"
    assert carried
    assert str(tmp_path) not in repr(carried)
    assert (tmp_path / "out" / "new a.txt").exists()


# --- what goes wrong


def test_a_missing_file_fails_the_task_before_anything_is_sent(dify: DifyStandIn, inbox: Path) -> None:
    result = run_operator(f"inputs={{'report': DifyFile('{inbox}/z.txt')}}, retries=2")
    assert result.tries["run"] == 1
    (error,) = result.raised["run"]
    assert isinstance(error, DifyConfigurationError)
    assert "z.txt' could not be read" in str(error)
    assert not dify.uploads
    assert not dify.started


def test_a_file_that_the_field_does_not_take_fails_the_task(dify: DifyStandIn, inbox: Path) -> None:
    dify.user_input_form = [form_field("report", "file", allowed_file_types=["image"])]
    result = run_operator(f"inputs={{'report': DifyFile('{inbox}/a.txt')}}")
    assert isinstance(result.raised["run"][0], DifyInputsRejected)
    assert not dify.uploads


@pytest.mark.parametrize("user", each_or_long([None, "me"], short=[None]))
def test_a_failed_download_is_left_to_a_retry_that_starts_and_uploads_nothing(
    dify: DifyStandIn, inbox: Path, tmp_path: Path, user: str | None
) -> None:
    dify.misbehave(respond(502), times=RETRIES + 1, only="GET /files")
    result = run_operator(
        f"inputs={{'report': DifyFile('{inbox}/a.txt')}}, output_files='{tmp_path}/out', retries=1, user={user!r}, "
        # Dify says whole seconds, and a run from before the Dag run is none of its own.
        "pre_execute=lambda context: __import__('time').sleep(1.1)"
    )
    assert result.state == "success"
    assert result.tries["run"] == 2
    (error,) = result.raised["run"]
    assert isinstance(error, DifyFilesError)
    assert "has succeeded, and its outputs are in the XComs" in str(error)
    assert (len(dify.uploads), len(dify.started), dify.stopped) == (1, 1, [])
    assert (tmp_path / "out" / "new a.txt").read_text() == "TEXT OF A"


def test_an_expired_file_fails_the_task_whose_outputs_are_xcoms(dify: DifyStandIn, inbox: Path, tmp_path: Path) -> None:
    dify.files_age = 301
    result = run_operator(
        f"inputs={{'report': DifyFile('{inbox}/a.txt')}}, output_files='{tmp_path}/out', retries=2, "
        "multiple_outputs=False"
    )
    assert result.states["run"] == "failed"
    assert result.tries["run"] == 1
    (error,) = result.raised["run"]
    assert isinstance(error, DifyFilesLost)
    assert "expired 300 s after the run's end" in str(error)
    assert result.xcoms["run"]["return_value"]["text"] == "hello"
    assert result.xcoms["run"]["workflow_run"]["status"] == "succeeded"
    assert dify.stopped == []


# --- batches


def test_each_kind_of_rows_has_files(dify: DifyStandIn, inbox: Path, tmp_path: Path) -> None:
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    lines.write_text("".join(json.dumps({"report": {"$file": f"{inbox}/{n}.txt"}}) + "\n" for n in "abc"))
    table.write_text("report\n" + "".join(f"{inbox}/{n}.txt\n" for n in "abc"))
    for number, rows in enumerate(
        [
            f"[{{'report': DifyFile(f'{inbox}/{{n}}.txt')}} for n in 'abc']",
            f"{str(lines)!r}",
            f"{str(table)!r}, file_columns=['report']",
            f"DifyFile.each('{inbox}/{{{{ \"*\" }}}}.txt', field='report')",
        ]
    ):
        dify.uploads.clear()
        result = run_batch(f"inputs={rows}, output_files='{tmp_path}/{number}/{{index}}x'")
        assert result.state == "success"
        assert sorted(dify.uploads.values()) == [(f"{n}.txt", f"text of {n}".encode()) for n in "abc"]
        results = result.received["outputs"]
        assert [row["uploaded"] for row in results] == [{"files": 1, "bytes": 9}] * 3
        paths = [row["outputs"]["files"][0]["path"] for row in results]
        assert paths == [f"{tmp_path}/{number}/{index}x/new {n}.txt" for index, n in enumerate("abc")]
        assert [Path(path).read_text() for path in paths] == [f"TEXT OF {n}" for n in "ABC"]
    users = {dify.upload_users[file_id] for file_id in dify.uploads}
    assert users == {started.user for started in dify.started[-3:]}


@pytest.mark.parametrize("version", [None, "2d7a7544-770c-496f-8ef9-4e622682b330"])
def test_a_batch_reads_the_app_once_for_all_its_rows(
    dify: DifyStandIn, inbox: Path, tmp_path: Path, version: str | None
) -> None:
    dify.misbehave(respond(503), only="GET .*/parameters")
    result = run_batch(f"inputs=DifyFile.each('{inbox}', field='report'), workflow_id={version!r}")
    assert result.state == "success"
    assert len(dify.uploads) == 3
    assert len([request for request in dify.requests if request.path.endswith("/parameters")]) == 1


@pytest.mark.parametrize("has_name", [True, False])
def test_the_rows_of_a_folder_have_the_files_name_where_the_app_wants_it(
    dify: DifyStandIn, inbox: Path, tmp_path: Path, has_name: bool
) -> None:
    name = [form_field("file_name")] if has_name else []
    dify.user_input_form = [form_field("report", "file", required=True), *name]
    result = run_batch(f"inputs=DifyFile.each('{inbox}', field='report'), output_files='{tmp_path}/out'")
    assert result.state == "success"
    names = [started.inputs.get("file_name") for started in dify.started]
    assert sorted(filter(None, names)) == (["a.txt", "b.txt", "c.txt"] if has_name else [])
    assert (tmp_path / "out" / "2" / "new c.txt").exists()


def test_a_row_fails_with_the_words_of_a_refused_upload(dify: DifyStandIn, inbox: Path) -> None:
    dify.misbehave(rejects(413, "file_too_large", "too large for us"), only="POST .*/upload")
    rows = f"[{{'report': DifyFile(f'{inbox}/{{n}}.txt')}} for n in 'abz']"
    result = run_batch(f"inputs={rows}, max_failed_runs=2, max_active_runs=1")
    results = result.received["outputs"]
    assert [row["status"] for row in results] == ["failed", "succeeded", "failed"]
    assert "too large for us" in results[0]["error"]
    assert "z.txt' could not be read" in results[2]["error"]
    assert len(dify.started) == 1


def test_a_batch_whose_downloads_fail_is_continued_without_new_runs(
    dify: DifyStandIn, inbox: Path, tmp_path: Path
) -> None:
    dify.misbehave(respond(502), times=3 * (RETRIES + 1), only="GET /files")
    result = run_batch(
        f"inputs=DifyFile.each('{inbox}', field='report'), output_files='{tmp_path}/out', retries=3, "
        f"output_path='{tmp_path}/results.jsonl'"
    )
    assert result.state == "success"
    assert isinstance(result.raised["run"][0], DifyFilesError)
    assert (len(dify.started), len(dify.uploads)) == (3, 3)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [Path(row["outputs"]["files"][0]["path"]).read_text() for row in results] == [f"TEXT OF {n}" for n in "ABC"]


def test_an_expired_file_fails_its_row_only(dify: DifyStandIn, inbox: Path, tmp_path: Path) -> None:
    dify.misbehave(respond(404), only="GET /files")
    result = run_batch(
        f"inputs=DifyFile.each('{inbox}', field='report'), output_files='{tmp_path}/out', max_failed_runs=1, "
        "max_active_runs=1"
    )
    results = result.received["outputs"]
    assert [row["status"] for row in results] == ["failed", "succeeded", "succeeded"]
    assert "FILES_ACCESS_TIMEOUT" in results[0]["error"]
    assert results[0]["outputs"]["text"] == "hello"


@pytest.mark.parametrize("has_path", [True, *([False] if CAN_START_FROM_TRIGGER else [])])
def test_a_folder_that_changed_before_a_retry_is_a_clear_error(
    dify: DifyStandIn, inbox: Path, tmp_path: Path, has_path: bool
) -> None:
    dify.misbehave_always(respond(502), only="GET /files")
    path = f"output_path='{tmp_path}/results.jsonl'," if has_path else ""
    result = run_batch(
        f"inputs=DifyFile.each('{inbox}', field='report'), output_files='{inbox}/new', {path} retries=2, "
        f"pre_execute=lambda context: context['ti'].try_number == 2 and open('{inbox}/0.txt', 'w').close()"
    )
    first, second = result.raised["run"]
    assert isinstance(first, DifyFilesError)
    assert isinstance(second, DifyConfigurationError)
    assert "are not those of the batch's earlier try" in str(second)
    assert len(dify.started) == 3


def test_a_batch_with_too_many_lost_files_fails(dify: DifyStandIn, inbox: Path, tmp_path: Path) -> None:
    dify.files_age = 400
    result = run_batch(f"inputs=DifyFile.each('{inbox}', field='report'), output_files='{tmp_path}/out', retries=1")
    (error,) = result.raised["run"]
    assert isinstance(error, DifyBatchFailed)
    assert downloads_of(dify) <= 3
