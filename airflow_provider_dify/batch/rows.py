# SPDX-License-Identifier: Apache-2.0
"""The rows of a batch, one at a time: out of a list, or out of a file of JSON Lines or CSV on any storage."""

from __future__ import annotations

import asyncio
import csv
import json
import os
import re
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from airflow_provider_dify.api.models import digest_of, one_line
from airflow_provider_dify.exceptions import DifyConfigurationError
from airflow_provider_dify.files import DifyFile, DifyFiles
from airflow_provider_dify.runs.inputs import InputForm, check_inputs
from airflow_provider_dify.runs.storage import open_text, storage_errors, storage_path

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

# Characters of one row. A longer line is an error of its own, so that no file can fill the memory.
MAX_ROW_LENGTH = 10_000_000

# Rows that are read from a file at once, and the characters after which there are fewer of them.
_ROWS_READ = 100
_LENGTH_READ = 1_000_000


@dataclass(frozen=True)
class Row:
    """One row of a batch."""

    index: int  # from 0
    line: int | None  # of the file, on which it begins, from 1; None for a row of a list
    inputs: dict[str, Any] | None  # None for a row with an error
    error: str | None = None
    length: int = field(default=0, compare=False)  # characters in its file
    optional: tuple[str, ...] = ()  # inputs that are left out where the app has none of that name


def read_rows(inputs: Any, json_columns: Sequence[str] = (), file_columns: Sequence[str] = ()) -> Iterator[Row]:
    """Return the rows as :func:`_read_rows` does, with a DifyFile for each text in ``file_columns``."""
    rows = _read_rows(inputs, json_columns, file_columns)
    return (_with_files(row, file_columns) for row in rows) if file_columns else rows


def _with_files(row: Row, file_columns: Sequence[str]) -> Row:
    inputs = row.inputs or {}
    texts = {name: inputs[name] for name in file_columns if isinstance(inputs.get(name), str) and inputs[name]}
    return replace(row, inputs={**inputs, **{name: DifyFile(text) for name, text in texts.items()}}) if texts else row


def _read_rows(inputs: Any, json_columns: Sequence[str], file_columns: Sequence[str]) -> Iterator[Row]:
    """
    Return the rows of a list of dicts, or of a file that is read as a stream; what is no object has an error. In JSON
    Lines, blank lines are skipped. In CSV, the first line names the inputs, each value is text (JSON in
    ``json_columns``), a quoted value may have several lines, and an empty one is no input.
    """
    if isinstance(inputs, DifyFiles):
        paths = (path for path, _ in list_files(inputs))
        return (Row(index, None, inputs.row(path), optional=("file_name",)) for index, path in enumerate(paths))
    if not is_file(inputs):
        if not isinstance(inputs, Sequence) or isinstance(inputs, (bytes, bytearray)):
            raise DifyConfigurationError(
                "inputs must be a list of dicts, or the path or URL of a file of JSON Lines or CSV, but it is "
                f"{one_line(repr(inputs), 120)} ({type(inputs).__name__})."
            )
        return (_row(index, None, value) for index, value in enumerate(inputs))
    suffix = PurePath(str(inputs)).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _rows_of_json_lines(inputs)
    if suffix == ".csv":
        return _rows_of_csv(inputs, json_columns, file_columns)
    if str(inputs).lstrip()[:1] in ("[", "{"):
        raise DifyConfigurationError(
            f"inputs is a text, not a list of dicts: {one_line(str(inputs), 120)!r}. Pass the upstream task's output "
            "itself, as in inputs=rows(), or set render_template_as_native_obj=True on the Dag."
        )
    raise DifyConfigurationError(
        f"The file of inputs must end in .jsonl, .ndjson or .csv, but it is {one_line(str(inputs), 200)!r}."
    )


def load_lazy(inputs: Any) -> Any:
    """Return inputs that any thread can read: Airflow 2's lazy sequence of mapped results is bound to one thread."""
    is_lazy = isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes, bytearray, list, tuple))
    return list(inputs) if is_lazy else inputs


def count_rows(inputs: Any, json_columns: Sequence[str] = ()) -> int:
    """Return how many rows a batch has. A file is read once for that, as a stream."""
    if isinstance(inputs, DifyFiles):
        return len(list_files(inputs))
    if not is_file(inputs) and isinstance(inputs, Sequence):
        return len(inputs)
    return sum(1 for _ in read_rows(inputs, json_columns))


def is_file(inputs: Any) -> bool:
    """Return whether the inputs name a file."""
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    return isinstance(inputs, (str, os.PathLike, ObjectStoragePath))


def _row(index: int, line: int | None, value: Any, length: int = 0) -> Row:
    where = f"Row {index}" if line is None else f"Line {line}"
    if not isinstance(value, dict):
        return Row(index, line, None, f"{where} is no object, but {one_line(repr(value), 120)}.")
    if not all(isinstance(name, str) for name in value):
        return Row(index, line, None, f"{where} has an input whose name is no text.")
    return Row(index, line, value, length=length)


def _rows_of_json_lines(path: Any) -> Iterator[Row]:
    # Only "\n" ends a line: other separators may stand in a JSON text.
    with open_text(path, newline="\n") as file:
        lines = ((number, text) for number, text in _lines(file) if text is None or text.strip())
        for index, (number, text) in enumerate(lines):
            yield _parse_json(index, number, text)


def _parse_json(index: int, line: int, text: str | None) -> Row:
    if text is None:
        return Row(index, line, None, f"Line {line} is longer than {MAX_ROW_LENGTH:,} characters.")
    if not _is_utf8(text):
        return Row(index, line, None, f"Line {line} is not UTF-8.")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        return Row(index, line, None, f"Line {line} is no JSON: {one_line(str(error), 120)}.")
    try:
        return _row(index, line, _with_named_files(value), len(text))
    except DifyConfigurationError as error:
        return Row(index, line, None, f"Line {line} has a wrong file: {error}")


def _with_named_files(value: Any) -> Any:
    """Return a row with a DifyFile for each value, or item of a list, that is an object with ``$file``."""

    def convert(item: Any) -> Any:
        if not isinstance(item, dict) or not isinstance(item.get("$file"), str):
            return [convert(part) for part in item] if isinstance(item, list) else item
        settings = {name: item[name] for name in _FILE_SETTINGS if isinstance(item.get(name), str)}
        return DifyFile(item["$file"], **settings)

    is_row = isinstance(value, dict)
    return {name: convert(item) for name, item in value.items()} if is_row else value


_LISTING = "dify_batch_files"
_FILE_SETTINGS = ("type", "mime_type", "file_name")


def list_files(files: DifyFiles) -> list[tuple[str, int]]:
    """Return the paths and sizes of a batch's files, in the order of their names; read once."""
    if files.listed is None:
        path = storage_path(files.location)
        with storage_errors(files.location, "listed"):
            has_pattern = any(char in str(path.path) for char in "*?[")
            look = path.fs.glob if has_pattern else partial(path.fs.find, maxdepth=1)
            found = look(str(path.path), detail=True)
            # Without the connection in the URL's front, which the storage doesn't know.
            front = re.match(r"(?:[\w+.-]+://(?:[^/@]*@)?)?", files.location)
            files.listed = [
                (f"{front[0] if front else ''}{name}", int(info["size"] or 0))
                for name, info in sorted(found.items())
                if info["type"] == "file" and not name.endswith("/")
            ]
    return files.listed


def listing_of(inputs: Any) -> str:
    """Return what tells whether a batch's files are those of an earlier try; empty for other inputs."""
    return digest_of(json.dumps(list_files(inputs))) if isinstance(inputs, DifyFiles) else ""


def check_listing(inputs: Any, earlier: str) -> None:
    """Raise a DifyConfigurationError if a batch's files are not those of its earlier try."""
    if earlier and earlier != listing_of(inputs):
        raise DifyConfigurationError(
            f"The files of {one_line(inputs.location, 200)!r} are not those of the batch's earlier try: some came, "
            "went or changed. Clear the task to start from scratch, or put the folder back as it was."
        )


def keep_listing(inputs: Any, store: Any, max_tries: int | None) -> None:
    """Check a batch's files in Airflow's task state (3.3 and later), which keeps what they were for the next try."""
    if store is None or not isinstance(inputs, DifyFiles):
        return
    known = store.get(_LISTING)
    # More tries than before: the task was cleared, and starts from scratch.
    if isinstance(known, dict) and known.get("max_tries") == max_tries:
        check_listing(inputs, str(known.get("listing")))
    store.set(_LISTING, {"listing": listing_of(inputs), "max_tries": max_tries})


def _lines(file: Any) -> Iterator[tuple[int, str | None]]:
    """Return each line with its number from 1; ``None`` for one that is too long."""
    for number, text in enumerate(iter(lambda: file.readline(MAX_ROW_LENGTH + 1), ""), 1):
        is_too_long = len(text) > MAX_ROW_LENGTH and not text.endswith("\n")
        while is_too_long and (rest := file.readline(MAX_ROW_LENGTH)) and not rest.endswith("\n"):
            pass
        yield number, None if is_too_long else text


def _rows_of_csv(path: Any, json_columns: Sequence[str], file_columns: Sequence[str]) -> Iterator[Row]:
    with open_text(path, newline="") as file, _long_fields():
        records = _records(file)
        header = next(records, None)
        if header is None:
            return
        names = _check_header(path, header)
        named = [("json_columns", name) for name in json_columns] + [("file_columns", name) for name in file_columns]
        for argument, name in named:
            if name not in names:
                raise DifyConfigurationError(
                    f"{argument} names {one_line(name, 100)!r}, which is no column of {one_line(str(path), 200)!r}."
                )
        for index, record in enumerate(records):
            yield _parse_record(index, record, names, json_columns)


@dataclass(frozen=True)
class _Record:
    """A record of a CSV file, with its first and last line."""

    first: int
    last: int
    fields: list[str]
    error: str | None = None

    @property
    def where(self) -> str:
        return f"Line {self.first}" if self.first == self.last else f"What stands in lines {self.first} to {self.last}"


def _records(file: Any) -> Iterator[_Record]:
    """Return each record that is not empty; one that can't be read has an error."""
    # In pieces where a line is too long: the reader has a limit of its own.
    reader = csv.reader(iter(lambda: file.readline(MAX_ROW_LENGTH), ""), strict=True)
    while True:
        first = reader.line_num + 1
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield _Record(first, reader.line_num, [], str(error))
            continue
        if fields:
            yield _Record(first, reader.line_num, fields)


def _check_header(path: Any, header: _Record) -> list[str]:
    names = [name.strip() for name in header.fields]
    problem = (
        f"can't be read: {header.error}"
        if header.error
        else "is not UTF-8"
        if not all(map(_is_utf8, names))
        else "has a column without a name"
        if not all(names)
        else "names a column twice"
        if len(set(names)) < len(names)
        else None
    )
    if problem:
        raise DifyConfigurationError(
            f"The first line of {one_line(str(path), 200)!r} must name the inputs, but it {problem}."
        )
    return names


def _parse_record(index: int, record: _Record, names: list[str], json_columns: Sequence[str]) -> Row:
    problem = None
    inputs: dict[str, Any] = {}
    if record.error:
        problem = f"can't be read as CSV: {one_line(record.error, 120)}"
    elif len(record.fields) != len(names):
        problem = f"has {len(record.fields)} fields, but the header has {len(names)}"
    elif not all(map(_is_utf8, record.fields)):
        problem = "is not UTF-8"
    else:
        # CSV has no other way to say that a row has no such input. Dify takes no empty text for a select, say.
        inputs = {name: text for name, text in zip(names, record.fields, strict=True) if text}
        problem = _parse_cells(inputs, json_columns)
    if problem:
        return Row(index, record.first, None, f"{record.where} {problem}.")
    return Row(index, record.first, inputs, length=sum(map(len, record.fields)))


def _parse_cells(inputs: dict[str, Any], json_columns: Sequence[str]) -> str | None:
    """Parse the cells of these columns where they are; return what is wrong with the first that is no JSON."""
    for name in json_columns:
        try:
            if name in inputs:
                inputs[name] = json.loads(inputs[name])
        except (ValueError, RecursionError) as error:  # noqa: PERF203
            return f"has no JSON in the column {one_line(name, 100)!r}: {one_line(str(error), 120)}"
    return None


@contextmanager
def _long_fields() -> Iterator[None]:
    """Let a field of a CSV file be as long as a row; Python's own limit is 131,072 characters, for all readers."""
    limit = csv.field_size_limit()
    csv.field_size_limit(max(limit, MAX_ROW_LENGTH))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _is_utf8(text: str) -> bool:
    """Return whether a text that was read with ``surrogateescape`` was UTF-8."""
    return text.isascii() or not any("\udc80" <= char <= "\udcff" for char in text)


class RowsAhead:
    """The rows of a batch for an event loop, read in a thread: a storage may be slow."""

    def __init__(self, rows: Iterator[Row]) -> None:
        self._rows = rows
        self._read: deque[Row] = deque()

    async def next(self) -> Row | None:
        """Return the next row; ``None`` after the last one."""
        if not self._read:
            self._read.extend(await asyncio.to_thread(self._read_some))
        return self._read.popleft() if self._read else None

    def _read_some(self) -> list[Row]:
        rows: list[Row] = []
        length = 0
        while len(rows) < _ROWS_READ and length < _LENGTH_READ and (row := next(self._rows, None)) is not None:
            rows.append(row)
            length += row.length
        return rows


# A warning is logged for the first row that it is about; a million rows may have as many.
_MAX_WARNINGS = 20


class FormCheck:
    """The check of each row's inputs against the app's form, which is read once for all of them; none without it."""

    def __init__(self, log: Logger) -> None:
        self._log = log
        self.form = InputForm()
        self._warned: set[str] = set()

    def inputs_of(self, row: Row) -> dict[str, Any]:
        """Return a row's inputs, but those that are to be left out where the app doesn't have them."""
        inputs = row.inputs or {}
        if not row.optional:
            return inputs
        known = {item.variable for item in self.form.fields} if self.form.complete else row.optional
        return {name: value for name, value in inputs.items() if name not in row.optional or name in known}

    def problem_of(self, inputs: Mapping[str, Any]) -> str | None:
        """Return why Dify is sure to reject a row's inputs; ``None`` if nothing is known against them."""
        check = check_inputs(self.form, inputs)
        for warning in check.warnings:
            if warning not in self._warned and len(self._warned) < _MAX_WARNINGS:
                self._warned.add(warning)
                self._log.warning("%s", warning)
        rejection = check.rejection()
        return None if rejection is None else str(rejection)
