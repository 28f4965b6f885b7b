"""The rows of a batch: one at a time, out of lists and files, whatever is in them."""

from __future__ import annotations

import asyncio
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from airflow_provider_dify.batch import rows
from airflow_provider_dify.batch.rows import Row, RowsAhead, count_rows, read_rows
from airflow_provider_dify.exceptions import DifyConfigurationError, DifyError
from tests.unit.memory_storage import attach_memory


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_the_rows_of_a_list_are_its_dicts_in_order() -> None:
    assert list(read_rows([{"n": 1}, {"n": ""}])) == [Row(0, None, {"n": 1}), Row(1, None, {"n": ""})]
    assert count_rows([{"n": 1}, {"n": 2}]) == 2
    assert list(read_rows([])) == []


@pytest.mark.parametrize("value", [3, "text", None, [1], {1: "a"}])
def test_a_row_that_is_no_object_of_inputs_is_an_error_of_its_own(value: Any) -> None:
    bad, good = read_rows([value, {"n": 2}])
    assert bad.inputs is None
    assert "Row 0" in (bad.error or "")
    assert good.inputs == {"n": 2}


@pytest.mark.parametrize("inputs", [None, 5, b"rows.csv", {"n": 1}])
def test_inputs_that_are_no_rows_are_refused(inputs: Any) -> None:
    with pytest.raises(DifyConfigurationError, match="list of dicts"):
        read_rows(inputs)


def test_the_rows_of_json_lines_keep_their_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"n": 1}\r\n\n  \n{"n": "\\u2028 \u2028"}\n{"n": "", "m": null}')
    # An empty text is an input.
    last = Row(2, 5, {"n": "", "m": None})
    assert list(read_rows(path)) == [Row(0, 1, {"n": 1}), Row(1, 4, {"n": "\u2028 \u2028"}), last]
    assert count_rows(path) == 3


@pytest.mark.parametrize("url", ["{}", "file://{}"])
def test_a_file_is_named_by_its_path_or_its_url(tmp_path: Path, url: str) -> None:
    path = write(tmp_path / "rows.JSONL", "\ufeff" + json.dumps({"n": "é"}))
    assert [row.inputs for row in read_rows(url.format(path))] == [{"n": "é"}]


def test_a_file_of_any_storage_of_airflow_is_read() -> None:
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    attach_memory().pipe_file("/inputs/rows.csv", b"n\n1\n2\n")
    for path in ("memory://inputs/rows.csv", ObjectStoragePath("memory://inputs/rows.csv")):
        assert [row.inputs for row in read_rows(path)] == [{"n": "1"}, {"n": "2"}]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"[1, 2]", "is no object, but"),
        (b"null", "is no object, but None"),
        (b'{"n": 1', "is no JSON: Expecting"),
        (b'{"n": "\xff"}', "is not UTF-8"),
        (b"[" * 100_000, "is no JSON"),
    ],
)
def test_a_bad_line_is_an_error_with_its_number_and_the_others_are_read(tmp_path: Path, line: bytes, why: str) -> None:
    good, bad, last = read_rows(write(tmp_path / "rows.ndjson", b'{"n": 1}\n' + line + b'\n{"n": 3}\n'))
    assert (good.inputs, last.inputs) == ({"n": 1}, {"n": 3})
    assert (bad.index, bad.line, bad.inputs) == (1, 2, None)
    assert (bad.error or "").startswith("Line 2 ")
    assert why in (bad.error or "")


def test_a_line_that_is_too_long_is_an_error_and_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_ROW_LENGTH", 100)
    long, good = read_rows(write(tmp_path / "rows.jsonl", '{"n": "' + "x" * 950 + '"}\n{"n": 2}'))
    assert "Line 1 is longer than 100 characters" in (long.error or "")
    assert good == Row(1, 2, {"n": 2})


def test_the_first_line_of_csv_names_the_inputs_and_values_are_text(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", '\ufeffid, name\r\n1,"a, b"\r\n\r\n2,"two\nlines"\r\n"",fast\r\n3," "\r\n,\r\n')
    # An empty cell is no input.
    assert list(read_rows(path)) == [
        Row(0, 2, {"id": "1", "name": "a, b"}),
        Row(1, 4, {"id": "2", "name": "two\nlines"}),
        Row(2, 6, {"name": "fast"}),
        Row(3, 7, {"id": "3", "name": " "}),
        Row(4, 8, {}),
    ]
    assert count_rows(path) == 5


def test_the_cells_of_a_json_column_of_csv_are_parsed(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv", 'query,meta\n1,"{""tags"": [1, ""ä""]}"\n2,7\n3,\n4,null\n5,"{\n""a"": true}"\n'
    )
    assert [row.inputs for row in read_rows(path, ("meta",))] == [
        {"query": "1", "meta": {"tags": [1, "ä"]}},
        {"query": "2", "meta": 7},
        {"query": "3"},
        {"query": "4", "meta": None},
        {"query": "5", "meta": {"a": True}},
    ]


def test_a_cell_of_a_json_column_that_is_no_json_is_an_error_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "query,meta\n1,{}\n2,{a: 1}\n3,[]\n")
    good, bad, last = read_rows(path, ("meta",))
    assert (good.inputs, last.inputs) == ({"query": "1", "meta": {}}, {"query": "3", "meta": []})
    assert (bad.index, bad.line, bad.inputs) == (1, 3, None)
    assert (bad.error or "").startswith("Line 3 has no JSON in the column 'meta': Expecting property name")


def test_a_json_column_that_the_header_does_not_name_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "query,meta\n1,{}\n")
    with pytest.raises(DifyConfigurationError, match="json_columns names 'mata', which is no column of"):
        count_rows(path, ("meta", "mata"))


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"1", "Line 3 has 1 fields, but the header has 2"),
        (b"1,2,3", "Line 3 has 3 fields, but the header has 2"),
        (b"1,\xff", "Line 3 is not UTF-8"),
        (b'1,"a"b', "Line 3 can't be read as CSV"),
    ],
)
def test_a_bad_record_of_csv_is_an_error_and_the_others_are_read(tmp_path: Path, record: bytes, why: str) -> None:
    good, bad, last = read_rows(write(tmp_path / "rows.csv", b"id,name\n0,a\n" + record + b"\n9,z\n"))
    assert (good.inputs, last.inputs) == ({"id": "0", "name": "a"}, {"id": "9", "name": "z"})
    assert why in (bad.error or "")
    assert (bad.index, bad.line) == (1, 3)


def test_a_quote_that_never_ends_is_an_error_that_names_its_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", 'id,name\n1,a\n2,"b\n3,c\n4,d\n')
    good, bad = read_rows(path)
    assert good.inputs == {"id": "1", "name": "a"}
    assert "What stands in lines 3 to 5 can't be read as CSV" in (bad.error or "")


def test_a_long_field_of_csv_is_read(tmp_path: Path) -> None:
    (row,) = read_rows(write(tmp_path / "rows.csv", "text\n" + "x" * 500_000))
    assert row.inputs == {"text": "x" * 500_000}


@pytest.mark.parametrize(
    ("header", "why"), [("a,,b", "without a name"), ("a,b, a", "twice"), ('"a', "can't be read"), ("a,\udcff", "UTF-8")]
)
def test_a_header_that_names_no_inputs_is_refused(tmp_path: Path, header: str, why: str) -> None:
    path = write(tmp_path / "rows.csv", header.encode("utf-8", "surrogateescape") + b"\n1,2\n")
    with pytest.raises(DifyConfigurationError, match=why):
        list(read_rows(path))


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_an_empty_file_has_no_rows(tmp_path: Path, name: str) -> None:
    assert list(read_rows(write(tmp_path / name, ""))) == []


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("rows.xlsx", "must end in .jsonl, .ndjson or .csv"),
        ("rows", "must end in"),
        ("missing.csv", "could not be read"),
        ("nosuch://bucket/rows.csv", "could not be reached"),
    ],
)
def test_a_file_that_can_not_be_read_fails_without_retry(tmp_path: Path, path: str, why: str) -> None:
    place = path if "://" in path else str(tmp_path / path)
    with pytest.raises(DifyConfigurationError, match=why):
        list(read_rows(place))


def test_a_storage_that_fails_is_a_dify_error_that_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the disk is away")

    monkeypatch.setattr("airflow_provider_dify.runs.storage.open_stream", fail)
    with pytest.raises(DifyError, match="the disk is away") as failure:
        list(read_rows(write(tmp_path / "rows.csv", "a\n1\n")))
    assert not isinstance(failure.value, DifyConfigurationError)


@pytest.mark.long
@pytest.mark.parametrize(("length", "count", "most"), [(1000, 20_000, 8_000_000), (1_000_000, 50, 12_000_000)])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_file_is_never_in_memory_and_few_long_rows_are_read_ahead(
    tmp_path: Path, name: str, length: int, count: int, most: int
) -> None:
    path, text = tmp_path / name, "x" * length
    with path.open("w") as file:
        file.write("text\n" if name == "rows.csv" else "")
        file.writelines([(text if name == "rows.csv" else json.dumps({"text": text})) + "\n"] * count)

    async def read_all() -> int:
        ahead, read = RowsAhead(read_rows(str(path))), 0
        while (row := await ahead.next()) is not None:
            read += row.inputs is not None
        return read

    tracemalloc.start()
    try:
        assert asyncio.run(read_all()) == count
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < most
