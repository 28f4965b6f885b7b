# SPDX-License-Identifier: Apache-2.0
"""How files are uploaded before a start: looked at first, then sent as streams, as the run's user."""

from __future__ import annotations

import asyncio
import io
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_provider_dify.api import calls
from airflow_provider_dify.api.calls import Call, parse_uploaded_file_id
from airflow_provider_dify.api.client import DifyClient
from airflow_provider_dify.api.session import CHUNK, UploadBody
from airflow_provider_dify.exceptions import (
    MAX_RETRY_DELAY,
    DifyConfigurationError,
    DifyConnectionError,
    DifyError,
    DifyFilesError,
    DifyFilesLost,
)
from airflow_provider_dify.files import DifyFile, files_in, with_files_as
from airflow_provider_dify.runs.inputs import InputForm, check_inputs, read_form
from airflow_provider_dify.runs.log import delay_after
from airflow_provider_dify.runs.storage import storage_errors, storage_path
from airflow_provider_dify.runs.waiting import WEEK_SECONDS, Deadline

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

T = TypeVar("T")

RETRIES = 4
RETRY_DELAY = 1.0
# What a connection carries at least, or it counts as broken.
BYTES_PER_SECOND = 50_000

_log: Any = logging.getLogger(__name__)


async def look_at_files(inputs: Mapping[str, Any]) -> None:
    """Let the files among inputs know their sizes, by which a run is recognized; one that is gone has none."""
    if files := files_in(inputs):
        await asyncio.to_thread(_look, files, is_required=False)


def _look(files: Iterable[DifyFile], *, is_required: bool = True) -> dict[DifyFile, bytes]:
    """Look at files, and keep their sizes; return what small ones hold. Raises a DifyError for what can't be read."""
    kept: dict[DifyFile, bytes] = {}
    room = CHUNK
    for file in files:
        try:
            with storage_errors(file.location, "read"):
                path = storage_path(file.location)
                info = path.fs.info(path.path)
                if info["type"] == "directory":
                    raise IsADirectoryError("it is a folder")
                file.size = int(info["size"])
                if is_required:
                    with path.fs.open(path.path, "rb") as opened:
                        if file.size <= room:
                            # One byte more tells whether it grows.
                            kept[file] = opened.read(file.size + 1)
                            room -= file.size
        except DifyError:  # noqa: PERF203
            if is_required:
                raise
    return kept


async def upload_inputs(
    client: DifyClient,
    inputs: Mapping[str, Any],
    user: str,
    workflow_id: str | None,
    *,
    form: InputForm | None = None,
    deadline: Deadline | None = None,
    log: Logger = _log,
    counter: Counter[str] | None = None,
) -> Mapping[str, Any]:
    """
    Upload the files among inputs as the run's user, just before a start, and return inputs with the uploads' ids. All
    files are looked at before the first is sent. ``form`` is the app's, if the inputs were checked by it already.
    """
    files = list(dict.fromkeys(files_in(inputs)))
    if not files:
        return inputs
    calls.check_user(user)
    deadline, local = deadline or Deadline.after(WEEK_SECONDS), [file for file in files if not file.is_url]
    async with client.uploads:
        kept = await asyncio.to_thread(_look, local)
        sizes = {file: file.size or 0 for file in local}
        for file in files_in(inputs):
            # Equal files are looked at once.
            file.size = sizes.get(file)
        is_checked = form is not None
        form = form or await read_form(client) or InputForm()
        # The form that Dify shows is the current version's; only now it is known how large the files are.
        form = form.limits_only() if is_checked or workflow_id is not None else form
        if (rejection := check_inputs(form, inputs).rejection(client.server_version)) is not None:
            raise rejection
        ids = {file: await _upload(client, file, kept.pop(file, None), user, deadline, log) for file in local}
    if counter is not None:
        counter.update(files=len(local), bytes=sum(sizes.values()))
    log.info("Uploaded %d files with %d bytes as user %r.", len(local), sum(sizes.values()), user)
    return with_files_as(inputs, lambda file: file.as_input(ids.get(file, "")))


async def _upload(
    client: DifyClient, file: DifyFile, kept: bytes | None, user: str, deadline: Deadline, log: Logger
) -> str:
    size = file.size or 0

    def open_file() -> Any:
        if kept is not None:
            return io.BytesIO(kept)
        path = storage_path(file.location)
        return path.fs.open(path.path, "rb", block_size=4 * CHUNK)

    body = UploadBody(file, user, size, open_file)
    whole = None if kept is None else b"".join(body)
    failed: list[DifyError] = []

    async def stream() -> AsyncIterator[bytes]:
        pieces: Any = iter(body)
        try:
            while (piece := await asyncio.to_thread(next, pieces, None)) is not None:
                yield piece
        except DifyError as error:
            failed.append(error)
            raise
        finally:
            await asyncio.to_thread(pieces.close)

    patience = client.response_timeout + size / BYTES_PER_SECOND
    call = Call(
        "POST",
        calls.UPLOAD,
        body.subject,
        parse_uploaded_file_id,
        patience_seconds=patience,
        data=stream if whole is None else lambda: whole,
        headers=body.headers,
    )

    async def send() -> str:
        failed.clear()
        try:
            return await client.perform(call)
        except DifyConnectionError as error:
            # A storage that failed in the middle looks like a lost connection.
            lost = failed[0] if failed else error
        raise lost

    def may_wait(error: DifyError, delay_seconds: float) -> bool:
        asked = getattr(error, "retry_after", None) or 0.0
        return asked <= MAX_RETRY_DELAY and delay_seconds < deadline.left

    return await again(send, may_wait, body.subject, log)


async def again(
    work: Callable[[], Awaitable[T]], may_wait: Callable[[DifyError, float], bool], subject: str, log: Logger
) -> T:
    """Do what a passing failure may be repeated for, some times, and while ``may_wait`` lets it."""
    for failures in range(1, RETRIES + 1):
        try:
            return await work()
        except (DifyConfigurationError, DifyFilesLost):
            raise
        except (DifyConnectionError, DifyFilesError) as error:
            like = error if isinstance(error, DifyConnectionError) else DifyConnectionError()
            delay = delay_after(like, failures, RETRY_DELAY)
            if not may_wait(error, delay):
                raise
            log.warning("Attempt %d of %s failed; the next is in %.1f seconds: %s", failures, subject, delay, error)
        await asyncio.sleep(delay)
    return await work()
