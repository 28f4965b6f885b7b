"""Files among outputs: downloaded while their URLs live, from nobody but those who may be asked, and saved whole."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import ssl
import time
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.exceptions import DifyFilesError, DifyFilesLost
from airflow_provider_dify.hooks.dify import DifyHook
from airflow_provider_dify.hooks.dify_async import DifyAsyncHook
from airflow_provider_dify.runs import downloads, uploads
from airflow_provider_dify.runs.downloads import Downloader, safe_name, save_outputs
from airflow_provider_dify.runs.waiting import Outcome, Verdict
from tests.dify_stand_in import API_KEY, DifyStandIn, redirect, reset, respond, truncate_body
from tests.unit.memory_storage import attach_memory

LOG: Any = logging.getLogger(__name__)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "RETRY_DELAY", 0.01)


@pytest.fixture
def hook(dify: DifyStandIn, dify_connection: str) -> DifyHook:
    return DifyHook(timeout=2)


def save(dify: DifyStandIn, outputs: dict[str, Any], target: Path | str, **settings: Any) -> Any:
    connection = DifyConnection("c", dify.base_url, API_KEY, **settings)

    async def work() -> Any:
        async with Downloader(connection) as downloader:
            return await save_outputs(downloader, outputs, str(target), LOG)

    return asyncio.run(work())


def downloads_of(dify: DifyStandIn) -> list[Any]:
    return [request for request in dify.requests if request.path.startswith("/files")]


# --- hook.download_file


@pytest.mark.parametrize("has_files_url", [False, True])
def test_a_file_is_downloaded_by_its_object_or_url_without_the_key(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path, has_files_url: bool
) -> None:
    dify.files_url = dify.origin if has_files_url else ""
    content = os.urandom(3_000_000)
    output = dify.files.make("answer.bin", content)
    assert output["url"].startswith(dify.origin if has_files_url else "/files/")
    assert hook.download_file(output, tmp_path / "new" / "a.bin") == str(tmp_path / "new" / "a.bin")
    assert hook.download_file(output["url"], f"{tmp_path}/") == f"{tmp_path}/{output['related_id']}.bin"
    assert hook.download_file(output, f"file://{tmp_path}/in/") == f"file://{tmp_path}/in/answer.bin"
    for path in ("new/a.bin", f"{output['related_id']}.bin", "in/answer.bin"):
        assert (tmp_path / path).read_bytes() == content
    for request in downloads_of(dify):
        assert "Authorization" not in request.headers
        assert "airflow-provider-dify" not in request.headers.get("User-Agent", "")


def test_an_uploaded_file_and_an_empty_one_are_downloaded(dify: DifyStandIn, hook: DifyHook, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("hello")
    output = dify.files.uploaded(hook.upload_file(path, "me"))
    hook.download_file(output, tmp_path / "b.txt")
    hook.download_file(dify.files.make("empty", b""), tmp_path / "empty")
    assert (tmp_path / "b.txt").read_text() == "hello"
    assert (tmp_path / "empty").read_bytes() == b""


def test_a_relative_url_is_completed_with_the_connections_files_url(
    dify: DifyStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"conn_type": "dify", "host": "http://127.0.0.1:9/v1", "password": API_KEY}
    monkeypatch.setenv("AIRFLOW_CONN_OTHER", json.dumps({**settings, "extra": {"files_url": dify.origin}}))
    DifyHook("other").download_file(dify.files.make("a", b"x"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"x"


@pytest.mark.parametrize("is_made", [True, False], ids=["tool file", "upload"])
def test_an_expired_url_says_so_and_is_not_asked_again(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path, is_made: bool
) -> None:
    dify.files_age = 301
    dify.uploads["f"], dify.upload_types["f"] = ("a.txt", b"x"), "text/plain"
    output = dify.files.make("a.txt", b"x") if is_made else dify.files.uploaded("f")
    with pytest.raises(DifyFilesLost, match=r"expired 300 s after the run's end, 30\d s after") as caught:
        hook.download_file(output, tmp_path / "a.txt")
    assert "sign=" not in str(caught.value)
    assert len(downloads_of(dify)) == 1
    assert os.listdir(tmp_path) == []


def test_a_url_that_dify_refuses_earlier_says_so(dify: DifyStandIn, hook: DifyHook, tmp_path: Path) -> None:
    dify.files_age, dify.files_lifetime = 60, 30
    with pytest.raises(DifyFilesLost, match="FILES_ACCESS_TIMEOUT is shorter than 300 s"):
        hook.download_file(dify.files.make("a.txt", b"x"), tmp_path / "a.txt")


# --- what a download meets


@pytest.mark.parametrize(
    "fault",
    [respond(503), respond(429), reset(), truncate_body(reset=True), truncate_body(reset=False)],
    ids=["503", "429", "reset", "cut by a reset", "cut"],
)
def test_a_failure_that_may_pass_is_met_with_another_download(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path, fault: Any
) -> None:
    dify.misbehave(fault, fault, only="GET /files")
    hook.download_file(dify.files.make("a.txt", b"x" * 1000), tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"x" * 1000
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_of_another_size_is_no_success(dify: DifyStandIn, hook: DifyHook, tmp_path: Path) -> None:
    output = dify.files.make("a.txt", b"x" * 1000)
    for size in (999, 1001):
        with pytest.raises(DifyFilesError, match=f"has not the {size:,} bytes that Dify said"):
            hook.download_file({**output, "size": size}, tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_a_failure_that_stays_ends_with_an_error_that_airflow_retries(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path
) -> None:
    dify.misbehave_always(respond(502), only="GET /files")
    with pytest.raises(DifyFilesError, match="HTTP 502") as caught:
        hook.download_file(dify.files.make("a.txt", b"x"), tmp_path / "a.txt")
    assert not isinstance(caught.value, DifyFilesLost)
    assert len(downloads_of(dify)) == uploads.RETRIES + 1


def test_nothing_is_asked_again_after_the_urls_end(dify: DifyStandIn, hook: DifyHook, tmp_path: Path) -> None:
    dify.misbehave_always(respond(502), only="GET /files")
    dify.files_age = 400
    with pytest.raises(DifyFilesError, match="HTTP 502"):
        hook.download_file(dify.files.make("a.txt", b"x"), tmp_path / "a.txt")
    assert len(downloads_of(dify)) == 1


def test_a_storage_that_refuses_is_an_error_that_airflow_retries(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    with pytest.raises(DifyFilesError, match="could not be written"):
        hook.download_file(dify.files.make("a.txt", b"x"), tmp_path / "file" / "a.txt")


# --- redirects and other origins


def test_a_redirect_within_dify_is_followed(dify: DifyStandIn, hook: DifyHook, tmp_path: Path) -> None:
    output = dify.files.make("a.txt", b"x")
    dify.misbehave(redirect(output["url"]), only="GET /files")
    hook.download_file({**output, "url": "/files/elsewhere"}, tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_bytes() == b"x"


def test_a_redirect_to_an_object_storage_is_followed_without_the_key(
    dify: DifyStandIn, tmp_path: Path, secure_dify: DifyStandIn, certificate: tuple[ssl.SSLContext, Path]
) -> None:
    output = secure_dify.files.make("a.txt", b"x")
    dify.misbehave(redirect(f"{secure_dify.origin}{output['url']}"), only="GET /files")
    elsewhere = {**output, "url": f"{dify.origin}/files/elsewhere"}
    # As a private address it has to be named.
    saved = save(dify, {"f": elsewhere}, tmp_path, files_url=secure_dify.origin, verify=str(certificate[1]))
    assert saved["f"]["path"] == f"{tmp_path}/a.txt"
    (request,) = secure_dify.requests
    assert "Authorization" not in request.headers


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://example.com/a", "neither https nor on Dify's server"),
        ("ftp://example.com/a", "neither https nor on Dify's server"),
        ("file:///etc/passwd", "neither https nor on Dify's server"),
        ("https://127.0.0.1/a", "'127.0.0.1', whose address is private"),
        ("https://10.0.0.1/a", "'10.0.0.1', whose address is private"),
        ("https://169.254.169.254/latest/meta-data", "whose address is private"),
        ("https://[::1]/a", "whose address is private"),
        ("https://[::ffff:10.0.0.1]/a", "whose address is private"),
        ("https://localhost/a", "'localhost', whose address is private"),
        ("https://2130706433/a", "whose address is private"),
        ("https://127.1/a", "whose address is private"),
        ("https://0x7f.0.0.1/a", "whose address is private"),
        ("https://me:secret@example.com/a", "malformed URL"),
        ("https://example.com\\@localhost/a", "malformed URL"),
        ("https://[no/a", "malformed URL"),
        ("https://example.com:0/a", "malformed URL"),
    ],
)
@pytest.mark.parametrize("is_redirect", [True, False], ids=["redirect", "url"])
def test_a_server_that_may_not_be_asked_is_not(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path, url: str, message: str, is_redirect: bool
) -> None:
    output = dify.files.make("a.txt", b"x")
    if is_redirect:
        dify.misbehave_always(redirect(url), only="GET /files")
    with pytest.raises(DifyFilesLost, match=message):
        hook.download_file(output if is_redirect else {**output, "url": url}, tmp_path / "a.txt")
    assert os.listdir(tmp_path) == []


def test_headers_of_the_connection_go_to_its_own_server_alone(
    dify: DifyStandIn,
    tmp_path: Path,
    secure_dify: DifyStandIn,
    certificate: tuple[ssl.SSLContext, Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The server of this test stands for one with a public address.
    monkeypatch.setattr(downloads, "_require_public", lambda address, host: None)
    headers = {"X-Gateway-Key": "a-secret-of-the-gateway"}
    for files_url in (None, secure_dify.origin):
        output = secure_dify.files.make("a.txt", b"x")
        elsewhere = {**output, "url": f"{dify.origin}/files/elsewhere"}
        dify.misbehave(redirect(f"{secure_dify.origin}{output['url']}"), only="GET /files")
        settings = {"headers": headers, "verify": str(certificate[1]), "files_url": files_url}
        assert save(dify, {"f": elsewhere}, tmp_path, **settings)["f"]["path"] == f"{tmp_path}/a.txt"
    assert {request.headers.get("X-Gateway-Key") for request in downloads_of(dify)} == {"a-secret-of-the-gateway"}
    assert len(secure_dify.requests) == 2
    for request in secure_dify.requests:
        assert not {"authorization", "x-gateway-key"} & {name.lower() for name in request.headers}


def test_a_name_that_leads_to_a_private_address_is_seen_when_it_is_looked_up(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = [{"hostname": "files.example.com", "host": "10.0.0.1", "port": 443, "family": 2, "proto": 6, "flags": 0}]

    async def resolve(*_: Any, **__: Any) -> Any:
        return found

    monkeypatch.setattr("aiohttp.resolver.DefaultResolver.resolve", resolve)
    output = {**dify.files.make("a.txt", b"x"), "url": "https://files.example.com/a"}
    with pytest.raises(DifyFilesLost, match=r"'files\.example\.com', whose address is private"):
        hook.download_file(output, tmp_path / "a.txt")


def test_no_log_and_no_error_has_the_signature_or_the_key(
    dify: DifyStandIn, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dify.misbehave_always(respond(502), only="GET /files")
    output = dify.files.make("a.txt", b"x")
    with caplog.at_level(logging.DEBUG), pytest.raises(DifyFilesError) as caught:
        save(dify, {"f": output}, tmp_path)
    said = caplog.text + repr(caught.value) + repr(caught.value.__context__)
    assert "Attempt 1 of the download of 'a.txt' failed" in said
    assert output["url"].partition("sign=")[2][:20] not in said
    assert API_KEY not in said


def test_an_older_file_stays_until_the_new_one_is_there_as_a_whole(
    dify: DifyStandIn, hook: DifyHook, tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("old")
    output = dify.files.make("a.txt", b"x" * 3_000_000)
    with pytest.raises(DifyFilesError):
        hook.download_file({**output, "size": 2_999_999}, tmp_path / "a.txt")
    assert (os.listdir(tmp_path), (tmp_path / "a.txt").read_text()) == (["a.txt"], "old")


def test_outputs_of_any_depth_end_in_an_error_of_ours_at_most(
    dify: DifyStandIn, dify_connection: str, tmp_path: Path
) -> None:
    deep: Any = dify.files.make("a.txt", b"x")
    for _ in range(3000):
        deep = [deep]
    run_id = dify.add_run("succeeded")

    async def work() -> Any:
        async with DifyAsyncHook() as client:
            run = replace(await client.get_workflow_run(run_id), outputs={"deep": deep})
            return await downloads.save_files(client, run, Verdict(Outcome.DONE, "over"), str(tmp_path), LOG)

    kept, lost = asyncio.run(work())
    assert kept.outputs["deep"] is deep
    assert isinstance(lost, DifyFilesError)


def test_redirects_without_end_are_no_way(dify: DifyStandIn, hook: DifyHook, tmp_path: Path) -> None:
    dify.misbehave_always(redirect("/files/again"), only="GET /files")
    with pytest.raises(DifyFilesError, match="more than 5 redirects"):
        hook.download_file(dify.files.make("a.txt", b"x"), tmp_path / "a.txt")


# --- the files among outputs


def test_every_file_among_outputs_is_saved_under_its_name(dify: DifyStandIn, tmp_path: Path) -> None:
    make = dify.files.make
    first = make("a.txt", b"1")
    outputs = {
        "text": "no file",
        "alone": first,
        "list": [first, make("A.txt", b"2"), make("a.txt", b"3")],
        "nested": {"deep": [{"file": make("b.pdf", b"4")}]},
        "like": {"filename": "c.txt", "url": "/files/c"},
    }
    saved = save(dify, outputs, f"{tmp_path}/out/")
    folder = f"{tmp_path}/out"
    assert saved["alone"] == {**first, "path": f"{folder}/a.txt"}
    assert [file["path"] for file in saved["list"]] == [f"{folder}/{name}" for name in ("a.txt", "A-2.txt", "a-3.txt")]
    assert saved["nested"]["deep"][0]["file"]["path"] == f"{folder}/b.pdf"
    assert (saved["text"], saved["like"]) == (outputs["text"], outputs["like"])
    names = {"a.txt": b"1", "A-2.txt": b"2", "a-3.txt": b"3", "b.pdf": b"4"}
    assert {path.name: path.read_bytes() for path in Path(folder).iterdir()} == names
    # A file that stands in two outputs is one.
    assert len(downloads_of(dify)) == 4


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/etc/passwd",
        "..",
        ".",
        "",
        None,
        5,
        "a\\..\\b",
        "a\0b",
        "x" * 500 + ".pdf",
        ".hidden",
        "a/b",
        "é" * 300,
    ],
)
def test_a_name_from_dify_leads_nowhere_else(dify: DifyStandIn, tmp_path: Path, name: Any) -> None:
    folder = tmp_path / "in" / "here"
    saved = save(dify, {"f": dify.files.make(name, b"x")}, folder)
    (path,) = folder.iterdir()
    assert saved["f"]["path"] == str(path)
    assert path.read_bytes() == b"x"
    assert [item.name for item in tmp_path.iterdir()] == ["in"]
    assert len(path.name.encode()) <= 200
    assert not path.name.startswith(".")


def test_two_names_that_a_disk_may_take_for_one_become_two(dify: DifyStandIn, tmp_path: Path) -> None:
    names = ["\u00e9.txt", "e\u0301.txt", "\u00c9.TXT", "straße.txt", "STRASSE.txt"]
    save(dify, {"list": [dify.files.make(name, b"x") for name in names]}, tmp_path)
    found = [unicodedata.normalize("NFC", name).casefold() for name in os.listdir(tmp_path)]
    assert len(set(found)) == len(names)


def test_names_stay_as_they_are_where_they_can() -> None:
    for name in ("Bericht ü (2).pdf", "报告.pdf", "a.tar.gz"):
        assert safe_name(name) == name


def test_a_link_in_the_folder_is_replaced_and_not_followed(dify: DifyStandIn, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("old")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.txt").symlink_to(tmp_path / "precious")
    save(dify, {"f": dify.files.make("a.txt", b"new")}, tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "old"
    assert (tmp_path / "out" / "a.txt").read_bytes() == b"new"


def test_an_object_storage_gets_whole_objects_or_none(dify: DifyStandIn) -> None:
    attach_memory()
    folder = f"memory://bucket-{time.monotonic_ns()}"
    content = os.urandom(2_500_000)
    saved = save(dify, {"f": dify.files.make("a.bin", content)}, folder)
    assert saved["f"]["path"] == f"{folder}/a.bin"
    files = MemoryFileSystem()
    assert files.cat(f"{folder}/a.bin") == content
    with pytest.raises(DifyFilesError):
        save(dify, {"f": {**dify.files.make("b.bin", content), "size": 2_400_000}}, folder)
    assert [name.rpartition("/")[2] for name in files.ls(folder, detail=False)] == ["a.bin"]


def test_few_files_are_downloaded_at_once(dify: DifyStandIn, tmp_path: Path) -> None:
    save(dify, {"list": [dify.files.make(f"{number}.txt", b"x" * 100_000) for number in range(30)]}, tmp_path)
    assert len(os.listdir(tmp_path)) == 30
    assert dify.files.most_active <= downloads._DOWNLOADS


def test_the_first_failure_ends_the_other_downloads(dify: DifyStandIn, tmp_path: Path) -> None:
    files = [dify.files.make(f"{number}.txt", b"x") for number in range(30)]
    with pytest.raises(DifyFilesLost, match="neither https"):
        save(dify, {"list": [{**files[0], "url": "http://example.com/"}, *files[1:]]}, tmp_path)
    assert len(downloads_of(dify)) < 30
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".")]
