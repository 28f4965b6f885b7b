"""Files as inputs: looked at, uploaded as the run's own user, and known again by name and size."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from airflow_provider_dify.batch.rows import count_rows, listing_of, read_rows
from airflow_provider_dify.exceptions import (
    DifyConfigurationError,
    DifyFilesError,
    DifyInputsRejected,
    DifyRequestError,
)
from airflow_provider_dify.files import DifyFile
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.runs import uploads
from airflow_provider_dify.runs.log import fingerprint, fits
from tests.dify_stand_in import (
    API_KEY,
    DifyStandIn,
    form_field,
    html,
    lose_response,
    rejects,
    reset,
    respond,
    too_many_requests,
)

FILE_ID = "2d7a7544-770c-496f-8ef9-4e622682b330"
FILE_FORM = [form_field("report", "file"), form_field("reports", "file-list"), form_field("query")]


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "RETRY_DELAY", 0.01)


@pytest.fixture
def hook(dify: DifyStandIn, dify_connection: str) -> DifyHook:
    return DifyHook(retry_delay=0.01, timeout=2)


@pytest.fixture
def report(tmp_path: Path) -> Path:
    path = tmp_path / "Bericht ü.pdf"
    path.write_bytes(b"%PDF " * 100)
    return path


def start(way: str, hook: DifyHook, inputs: dict[str, Any], **arguments: Any) -> None:
    """Start a run in one of the ways there are."""

    async def start_async() -> None:
        async with DifyAsyncHook() as client:
            if way == "async start":
                await (await client.start_workflow_run(inputs, "me", **arguments)).wait_closed()
            else:
                await client.run_workflow(inputs, "me", **arguments)

    if way == "start":
        hook.start_workflow_run(inputs, "me", **arguments).close()
    elif way == "run":
        hook.run_workflow(inputs, "me", **arguments)
    else:
        asyncio.run(start_async())


@pytest.mark.parametrize("way", ["start", "run", "async start", "async run"])
def test_a_file_is_uploaded_as_the_runs_user_before_the_start(
    dify: DifyStandIn, hook: DifyHook, report: Path, way: str
) -> None:
    text = report.with_name("a.txt")
    text.write_text("hello")
    reports = [DifyFile(report), DifyFile(f"file://{text}", type="custom"), DifyFile(url="https://example.com/x.png?a")]
    start(way, hook, {"query": "q", "report": DifyFile(str(report)), "reports": reports})
    by_name = {name: (file_id, content) for file_id, (name, content) in dify.uploads.items()}
    assert by_name["Bericht ü.pdf"][1] == report.read_bytes()
    assert by_name["a.txt"][1] == b"hello"
    assert set(dify.upload_users.values()) == {"me"} == {started.user for started in dify.started}
    assert dify.upload_types[by_name["Bericht ü.pdf"][0]] == "application/pdf"
    assert dify.started[0].inputs == {
        "query": "q",
        "report": {
            "type": "document",
            "transfer_method": "local_file",
            "upload_file_id": by_name["Bericht ü.pdf"][0],
        },
        "reports": [
            {"type": "document", "transfer_method": "local_file", "upload_file_id": by_name["Bericht ü.pdf"][0]},
            {"type": "custom", "transfer_method": "local_file", "upload_file_id": by_name["a.txt"][0]},
            {"type": "image", "transfer_method": "remote_url", "url": "https://example.com/x.png?a"},
        ],
    }


@pytest.mark.parametrize(
    ("name", "kind", "mime_type"),
    [
        ("a.PDF", "document", "application/pdf"),
        ("a.jpeg", "image", "image/jpeg"),
        ("a.mp3", "audio", "audio/mpeg"),
        ("a.mov", "video", "video/quicktime"),
        ("a.py", "document", "text/x-python"),
        ("a.parquet2", "custom", "application/octet-stream"),
        ("noending", "custom", "application/octet-stream"),
    ],
)
def test_types_are_guessed_from_the_name_and_can_be_set(name: str, kind: str, mime_type: str) -> None:
    file = DifyFile(f"s3://conn@bucket/in/{name}")
    assert (file.file_name, file.type, file.mime_type) == (name, kind, mime_type)
    assert DifyFile(name, type="audio", mime_type="x/y").as_input("id")["type"] == "audio"


@pytest.mark.parametrize(
    "arguments",
    [{}, {"path": "a", "url": "b"}, {"path": "a", "type": "pdf"}, {"path": "a", "mime_type": "a/b\r\nx: y"}],
)
def test_a_wrong_file_fails_where_it_is_written(arguments: dict[str, Any]) -> None:
    with pytest.raises(DifyConfigurationError, match="DifyFile"):
        DifyFile(**arguments)


def test_a_long_name_and_one_with_separators_are_made_fit() -> None:
    file = DifyFile("a.pdf", file_name='../"x"\r\n' + "é" * 300 + ".pdf")
    assert len(file.file_name) == 200
    assert file.file_name.startswith(".._")
    assert file.file_name.endswith(".pdf")
    assert not set('/"\r\n') & set(file.file_name)


# --- before anything is uploaded


@pytest.mark.parametrize("bad", ["missing.pdf", "."])
def test_nothing_is_uploaded_if_one_of_the_files_cannot_be_read(
    dify: DifyStandIn, hook: DifyHook, report: Path, bad: str
) -> None:
    files = [DifyFile(report), DifyFile(report.parent / bad)]
    with pytest.raises(DifyConfigurationError, match="could not be read"):
        hook.run_workflow({"reports": files}, "me")
    assert not dify.uploads
    assert not dify.started


@pytest.mark.parametrize("version", [None, FILE_ID])
def test_a_file_above_the_servers_limit_is_not_uploaded(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path, version: str | None
) -> None:
    path = tmp_path / "large.pdf"
    with path.open("wb") as file:
        file.truncate(16 * 1024 * 1024)
    with pytest.raises(DifyInputsRejected, match=r"'large.pdf' of 16,777,216 bytes, and Dify takes at most 15 MB"):
        hook.run_workflow({"report": DifyFile(path)}, "me", workflow_id=version)
    assert not dify.uploads


def test_the_form_of_the_current_version_says_nothing_of_the_types_that_another_takes(
    dify: DifyStandIn, hook: DifyHook, report: Path
) -> None:
    dify.user_input_form = [form_field("report", "file", allowed_file_types=["image"])]
    version = FILE_ID
    hook.run_workflow({"report": DifyFile(report)}, "me", workflow_id=version)
    assert len(dify.uploads) == 1


def test_a_file_that_grows_while_it_is_looked_at_starts_no_run(
    dify: DifyStandIn, hook: DifyHook, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = LocalFileSystem.info
    monkeypatch.setattr(LocalFileSystem, "info", lambda *args, **more: {**info(*args, **more), "size": 7})
    with pytest.raises(DifyFilesError, match="changed while it was read"):
        hook.run_workflow({"report": DifyFile(report)}, "me")
    assert not dify.started


def test_a_type_that_the_field_does_not_take_is_not_uploaded(dify: DifyStandIn, hook: DifyHook, report: Path) -> None:
    dify.user_input_form = [form_field("report", "file", allowed_file_types=["image"])]
    with pytest.raises(DifyInputsRejected, match="'type' of 'image', not 'document'"):
        hook.start_workflow_run({"report": DifyFile(report)}, "me")
    assert not dify.uploads


@pytest.mark.parametrize("fault", [reset(), respond(503), html(502), lose_response(reset())])
def test_an_upload_that_failed_for_a_passing_reason_is_sent_again(
    dify: DifyStandIn, hook: DifyHook, report: Path, fault: Any
) -> None:
    dify.misbehave(fault, fault, only="POST .*/upload")
    hook.run_workflow({"report": DifyFile(report)}, "me")
    assert len(dify.started) == 1


def test_a_refused_upload_fails_with_difys_words(dify: DifyStandIn, hook: DifyHook, report: Path) -> None:
    dify.misbehave(rejects(415, "unsupported_file_type", "File type not allowed."), only="POST .*/upload")
    with pytest.raises(DifyRequestError, match="File type not allowed"):
        hook.run_workflow({"report": DifyFile(report)}, "me")
    assert len([request for request in dify.requests if "upload" in request.path]) == 1
    assert not dify.started


@pytest.mark.parametrize("way", ["start", "run", "async run"])
def test_an_upload_is_not_sent_again_for_a_start_that_is(
    dify: DifyStandIn, hook: DifyHook, report: Path, way: str
) -> None:
    dify.misbehave(too_many_requests(), too_many_requests(), only="POST .*/run")
    start(way, hook, {"report": DifyFile(report)})
    assert (len(dify.uploads), len(dify.started)) == (1, 1)


def test_a_key_that_was_rotated_is_read_again_for_an_upload(
    dify: DifyStandIn, hook: DifyHook, report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook.run_workflow({}, "me")
    dify.api_keys = {"app-another-key-of-the-stand-in"}
    host, key = dify.base_url, "app-another-key-of-the-stand-in"
    monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", f'{{"conn_type": "dify", "host": "{host}", "password": "{key}"}}')
    hook.run_workflow({"report": DifyFile(report)}, "me")
    assert len(dify.uploads) == 1


@contextlib.contextmanager
def a_server_that_counts(size: int) -> Iterator[tuple[str, list[int]]]:
    """Serve uploads, of which nothing is kept but how long they were, and a file of this size."""
    received: list[int] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self.path.startswith("/large"):
                self.respond(b"{}")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            piece = bytes(1 << 20)
            for start in range(0, size, len(piece)):
                self.wfile.write(piece[: size - start])

        def do_POST(self) -> None:
            received.append(0)
            while received[-1] < int(self.headers["Content-Length"]):
                received[-1] += len(self.rfile.read1(1 << 16))
            self.respond(json.dumps({"id": FILE_ID}).encode())

        def respond(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", received
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("way", ["input", "path", "open file", "download"])
@pytest.mark.parametrize("size", [200_000_000, pytest.param(1_000_000_000, marks=pytest.mark.long)])
@pytest.mark.skipif(sys.platform != "linux", reason="Only Linux forgets the peak of a process")
def test_a_large_file_takes_a_bounded_part_of_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int, way: str
) -> None:
    path = tmp_path / "large.bin"
    with path.open("wb") as file:
        file.truncate(size)

    async def upload() -> Mapping[str, Any]:
        async with DifyAsyncHook() as client:
            return await uploads.upload_inputs(client, {"report": DifyFile(path)}, "me", None)

    with a_server_that_counts(size) as (base_url, received):
        settings = {"conn_type": "dify", "host": base_url, "password": API_KEY}
        monkeypatch.setenv("AIRFLOW_CONN_DIFY_DEFAULT", json.dumps(settings))
        before = peak_kib(forget=True)
        if way == "input":
            assert asyncio.run(upload())["report"]["upload_file_id"] == FILE_ID
        elif way == "path":
            assert DifyHook().upload_file(path, "me") == FILE_ID
        elif way == "open file":
            with path.open("rb") as file:
                file.seek(1)
                assert DifyHook().upload_file(file, "me") == FILE_ID
        else:
            DifyHook().download_file({"url": "/large", "size": size}, tmp_path / "new.bin")
            assert (tmp_path / "new.bin").stat().st_size == size
        assert peak_kib() - before < 64 * 1024
    if way != "download":
        (count,) = received
        assert 0 < count - size < 1000


def peak_kib(*, forget: bool = False) -> int:
    """Return how much memory this process had at most since that was forgotten."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


# --- the rows of a batch


def test_rows_of_each_kind_have_files(tmp_path: Path) -> None:
    lines, table = tmp_path / "rows.jsonl", tmp_path / "rows.csv"
    lines.write_text(
        '{"report": {"$file": "a.pdf", "type": "custom"}, "l": [{"$file": "b.png"}, 1]}\n{"n": {"m": 1}}\n'
    )
    table.write_text("report,n\na.pdf,1\n,2\n")
    assert [row.inputs for row in read_rows(lines)] == [
        {"report": DifyFile("a.pdf", type="custom"), "l": [DifyFile("b.png"), 1]},
        {"n": {"m": 1}},
    ]
    assert [row.inputs for row in read_rows(table, (), ("report",))] == [
        {"report": DifyFile("a.pdf"), "n": "1"},
        {"n": "2"},
    ]
    with pytest.raises(DifyConfigurationError, match="file_columns names 'reprt', which is no column"):
        list(read_rows(table, (), ("reprt",)))
    given = [{"report": DifyFile("a.pdf")}, {"report": {"$file": "/etc/passwd"}}]
    assert [row.inputs for row in read_rows(given)] == given
    (row,) = read_rows([{"report": "a.pdf"}], (), ("report",))
    assert row.inputs == {"report": DifyFile("a.pdf")}


def test_a_line_with_a_wrong_file_is_a_row_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"report": {"$file": "a.pdf", "type": "pdf"}}\n')
    (row,) = read_rows(path)
    assert row.inputs is None
    assert "The type of a DifyFile must be one of" in str(row.error)


@pytest.mark.parametrize("front", ["", "file://"])
def test_a_folder_or_pattern_makes_rows_in_the_order_of_names(tmp_path: Path, front: str) -> None:
    for name in ("b.pdf", "a.pdf", "c.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "folder.pdf").mkdir()
    rows = DifyFile.each(f"{front}{tmp_path}/*.pdf", field="report", type="custom")
    assert count_rows(rows) == 2
    assert [row.inputs for row in read_rows(rows)] == [
        {"report": DifyFile(f"{front}{tmp_path}/{name}", type="custom"), "file_name": name}
        for name in ("a.pdf", "b.pdf")
    ]
    assert count_rows(DifyFile.each(tmp_path, field="report")) == 3
    before = listing_of(rows)
    assert before == listing_of(DifyFile.each(f"{front}{tmp_path}/*.pdf", field="report"))
    (tmp_path / "d.pdf").write_text("new")
    assert before != listing_of(DifyFile.each(f"{front}{tmp_path}/*.pdf", field="report"))


# --- the fingerprint


def test_a_run_is_known_again_by_its_files_names_and_sizes(dify: DifyStandIn, hook: DifyHook, report: Path) -> None:
    dify.echoes_inputs = True
    run = hook.run_workflow({"report": DifyFile(report), "reports": [DifyFile(report)]}, "me")
    assert run.inputs is not None
    same, other = DifyFile(report), DifyFile(report)
    asyncio.run(uploads.look_at_files({"report": same}))
    other.size = 1
    assert set(fingerprint({"report": same, "reports": [same]})) == {"report", "reports"}
    assert fits(fingerprint({"report": same, "reports": [same]}), run.inputs) is True
    assert fits(fingerprint({"report": other}), run.inputs) is False
    assert fits(fingerprint({"reports": [same, same]}), run.inputs) is False
    # One that is gone by now is not compared.
    assert fingerprint({"report": DifyFile(report.with_name("gone.pdf"))}) == {}
