# SPDX-License-Identifier: Apache-2.0
"""How the files among a run's outputs are downloaded: from addresses that nobody trusts, to any storage."""

from __future__ import annotations

import asyncio
import ipaddress
import os
import re
import time
import unicodedata
import uuid
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace
from functools import partial
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urljoin, urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver
from aiohttp.resolver import DefaultResolver
from yarl import URL

from airflow_provider_dify.api.client import MAX_REDIRECTS, DifyClient, SharedSession
from airflow_provider_dify.api.connection import DifyConnection
from airflow_provider_dify.api.http_response import reason_of
from airflow_provider_dify.api.models import WorkflowRun, one_line
from airflow_provider_dify.api.session import CHUNK
from airflow_provider_dify.exceptions import DifyError, DifyFilesError, DifyFilesLost
from airflow_provider_dify.runs.storage import storage_errors, storage_path
from airflow_provider_dify.runs.uploads import BYTES_PER_SECOND, again
from airflow_provider_dify.runs.waiting import Outcome, Verdict

if TYPE_CHECKING:
    from airflow.sdk.types import Logger

# Files of one run that are downloaded at once.
_DOWNLOADS = 4
# Seconds for which Dify's signatures are good by default (`FILES_ACCESS_TIMEOUT`).
LIFETIME_SECONDS = 300


def is_file(value: Any) -> bool:
    """Return whether an output is a file as Dify describes it."""
    return isinstance(value, dict) and value.get("dify_model_identity") == "__dify__file__"


def with_paths(value: Any, paths: Mapping[str, str]) -> Any:
    """Return an output with the path of each file beside what Dify said, by :func:`_key_of`."""
    if is_file(value):
        return {**value, "path": paths[_key_of(value)]} if _key_of(value) in paths else value
    if isinstance(value, dict):
        return {name: with_paths(item, paths) for name, item in value.items()}
    return [with_paths(item, paths) for item in value] if isinstance(value, list) else value


def files_among(outputs: Any) -> dict[str, dict[str, Any]]:
    """Return the files among outputs, however deep, each once: a file may stand in several outputs."""
    found: dict[str, dict[str, Any]] = {}
    pending = [outputs]
    while pending:
        value = pending.pop(0)
        if is_file(value):
            found.setdefault(_key_of(value), value)
        elif isinstance(value, (dict, list)):
            pending[:0] = list(value.values() if isinstance(value, dict) else value)
    return found


def _key_of(file: Mapping[str, Any]) -> str:
    return str(file.get("related_id") or file.get("url"))


async def save_files(
    client: DifyClient, run: WorkflowRun, verdict: Verdict, folder: str | None, log: Logger
) -> tuple[WorkflowRun, DifyFilesError | None]:
    """
    Save the files among the outputs of a run that succeeded, where a folder is given. Return the run, with the files'
    paths among its outputs; or as it was, and what went wrong.
    """
    if folder is None or verdict.outcome is not Outcome.DONE or verdict.is_failure or client.connection is None:
        return run, None
    try:
        if client.downloader is None:
            # For all of the client's runs, whose files come over kept connections then.
            client.downloader = await client.until_exit.enter_async_context(Downloader(client.connection))
        return replace(run, outputs=await save_outputs(client.downloader, run.outputs, folder, log)), None
    except (DifyError, RecursionError) as error:
        return run, error if isinstance(error, DifyFilesError) else DifyFilesError(str(error))


async def save_outputs(
    downloader: Downloader, outputs: dict[str, Any] | None, target: str, log: Logger
) -> dict[str, Any] | None:
    """Download every file among a run's outputs into a folder, and return the outputs with their paths."""
    if not (files := files_among(outputs)):
        return outputs
    taken: set[str] = set()
    names = {key: _unique_name(file.get("filename"), taken) for key, file in files.items()}
    places = asyncio.Semaphore(_DOWNLOADS)

    async def save(key: str) -> str:
        async with places:
            return await downloader.download(files[key], f"{target.rstrip('/')}/{names[key]}", log)

    tasks = [asyncio.create_task(save(key)) for key in files]
    try:
        paths = dict(zip(files, await asyncio.gather(*tasks), strict=True))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    saved: dict[str, Any] | None = with_paths(outputs, paths)
    return saved


async def download(connection: DifyConnection, output: Mapping[str, Any] | str, target: str, log: Logger) -> str:
    """Download one file, as :meth:`Downloader.download`."""
    async with Downloader(connection) as downloader:
        return await downloader.download(output, target, log)


def safe_name(name: object) -> str:
    """Return a name from Dify as a file may have it on any storage: no folder, nothing hidden, no long one."""
    # Some disks take two spellings of a letter for one.
    text = unicodedata.normalize("NFC", name) if isinstance(name, str) else ""
    kept = "".join(c if c.isprintable() and c not in '/\\:*?"<>|#%' else "_" for c in text).strip(" .")
    stem, ending = os.path.splitext(kept or "file")
    ending = ending.encode()[:20].decode(errors="ignore")
    return stem.encode()[: 200 - len(ending.encode())].decode(errors="ignore") + ending


def _unique_name(name: object, taken: set[str]) -> str:
    stem, ending = os.path.splitext(safe_name(name))
    unique, number = stem + ending, 1
    # Some storages don't tell upper from lower case.
    while unique.casefold() in taken:
        number += 1
        unique = f"{stem}-{number}{ending}"
    taken.add(unique.casefold())
    return unique


class _Sink:
    """A file that is written on any storage, and is there as a whole or not at all."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._part: Any = None

    def write(self, data: bytes, *, is_last: bool = False) -> None:
        """Write a piece, which blocks; after the last one the file is there under its name."""
        with storage_errors(self._target, "written"):
            path = storage_path(self._target)
            name, protocol = str(path.path), path.fs.protocol
            is_local = "file" in ((protocol,) if isinstance(protocol, str) else protocol)
            if self._part is None and is_last and not is_local:
                path.fs.pipe_file(name, data)
                return
            if self._part is None:
                # Beside the file, where a rename is atomic; an object store gets the whole file at its end.
                folder = os.path.dirname(os.path.abspath(name)) if is_local else gettempdir()
                os.makedirs(folder, exist_ok=True)
                self._part = open(os.path.join(folder, f".{uuid.uuid4().hex}.part"), "xb")  # noqa: SIM115
            self._part.write(data)
            if is_last:
                self._part.close()
                if is_local:
                    os.replace(self._part.name, name)
                    self._part = None
                else:
                    path.fs.put_file(self._part.name, name)

    async def end(self) -> None:
        """Leave nothing else behind."""
        if self._part is not None:
            self._part.close()
            # A write that was cancelled goes on in its thread, and may have moved it.
            with suppress(FileNotFoundError):
                await asyncio.to_thread(os.unlink, self._part.name)


class _FileSession(SharedSession):
    """A session for signed addresses, which need no key: it sends at most the headers for what is in front of Dify."""

    def _new_client(self, *args: Any, **limits: Any) -> aiohttp.ClientSession:
        client = super()._new_client(*args, **limits)
        client.headers.clear()
        client.headers.update(self.connection.headers)
        return client


class _ForeignSession(_FileSession):
    """A session for servers that are not Dify's, which have public addresses. A proxy, if there is one, decides."""

    def _new_client(self, *args: Any, **limits: Any) -> aiohttp.ClientSession:
        own = {} if self.proxy or self.socks_proxy else {"resolver": _PublicResolver()}
        return super()._new_client(*args, **own, **limits)


class _PublicResolver(AbstractResolver):
    def __init__(self) -> None:
        self._resolver = DefaultResolver()

    async def resolve(self, host: str, port: int = 0, *args: Any, **kwargs: Any) -> Any:
        found = await self._resolver.resolve(host, port, *args, **kwargs)
        for address in found:
            _require_public(address["host"], host)
        return found

    async def close(self) -> None:
        await self._resolver.close()


def _require_public(address: str, host: str) -> None:
    try:
        is_public = ipaddress.ip_address(address.partition("%")[0]).is_global
    except ValueError:
        # A name is looked up first, but the client takes also such as 2130706433 for an address.
        is_public = ":" not in address and not address.replace(".", "").isdigit()
    if not is_public:
        raise DifyFilesLost(
            f"A file's URL leads to {one_line(host, 100)!r}, whose address is private, and which is not Dify's own "
            "server. If it belongs to Dify, put its origin into the connection's extra 'files_url'."
        )


@dataclass
class Downloader:
    """Downloads files that Dify signed; used as ``async with``."""

    connection: DifyConnection

    async def __aenter__(self) -> Downloader:
        self._stack = AsyncExitStack()
        self._sessions: dict[tuple[type[_FileSession], str], _FileSession] = {}
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def download(self, output: Mapping[str, Any] | str, target: str, log: Logger) -> str:
        """
        Download a file, again where a failure may pass and the URL lives; return its path.

        Raises a DifyFilesError, and of these a DifyFilesLost where the URL lives no more.
        """
        file: Mapping[str, Any] = {"url": output} if isinstance(output, str) else output
        url, size = str(file.get("url") or file.get("remote_url") or ""), file.get("size")
        if not url:
            raise DifyFilesLost(f"Dify gave no URL for the file {one_line(str(file.get('filename')), 100)!r}.")
        url = _joined(self.connection.files_url or self.connection.base_url, url)
        expected = size if isinstance(size, int) and size > 0 else None
        signed_at = _signed_at(url)
        if target.endswith("/"):
            target += safe_name(file.get("filename") or urlsplit(url).path.rpartition("/")[2])

        def may_wait(error: DifyError, delay_seconds: float) -> bool:
            return signed_at is None or time.time() + delay_seconds < signed_at + LIFETIME_SECONDS

        async def attempt() -> None:
            sink = _Sink(target)
            try:
                await self._fetch(url, expected, sink)
            finally:
                await sink.end()

        subject = f"the download of {one_line(str(file.get('filename') or urlsplit(url).path), 100)!r}"
        await again(attempt, may_wait, subject, log)
        return target

    async def _fetch(self, url: str, expected: int | None, sink: _Sink) -> None:
        """Follow redirects, each to a server that may be asked, and write what the last one sends."""
        first = url
        connect, total = self.connection.timeouts()
        longest = None if expected is None else total + expected / BYTES_PER_SECOND
        timeout = aiohttp.ClientTimeout(total=longest, sock_connect=connect, sock_read=total)
        headers = {"Accept-Encoding": "identity"}
        for _ in range(MAX_REDIRECTS + 1):
            session = self._session_for(url)
            client = await session.open()
            try:
                async with client.get(
                    URL(url, encoded=True), allow_redirects=False, proxy=session.proxy, timeout=timeout, headers=headers
                ) as response:
                    location = response.headers.get("Location") if 300 <= response.status < 400 else None
                    if location is not None:
                        url = _joined(url, location)
                        continue
                    if response.status != 200:
                        raise _refusal(first, url, response.status)
                    await _receive(response, expected, sink)
                    return
            except DifyFilesError:
                raise
            except DifyError as error:
                # Of the storage: the run is paid for, and a person may open the storage to a retry.
                failure = DifyFilesError(str(error))
            except Exception as error:
                # Whatever the client calls it.
                reason = reason_of(error, self.connection.secrets)
                failure = DifyFilesError(f"{reason}: the file at {_shown(url)} could not be downloaded.")
            raise failure
        raise DifyFilesLost(f"The file at {_shown(first)} is behind more than {MAX_REDIRECTS} redirects.")

    def _session_for(self, url: str) -> _FileSession:
        parts = urlsplit(url)
        connection = self.connection
        is_dify = connection.owns(url)
        is_own = is_dify or bool(connection.files_url and replace(connection, base_url=connection.files_url).owns(url))
        if not is_own:
            if parts.scheme != "https":
                raise DifyFilesLost(
                    f"A file's URL leads to {_shown(url)}, which is neither https nor on Dify's server. If it belongs "
                    "to Dify, put its origin into the connection's extra 'files_url'."
                )
            _require_public(parts.hostname or "", parts.hostname or "")
        kind = _FileSession if is_own else _ForeignSession
        origin = f"{parts.scheme}://{parts.netloc}"
        session = self._sessions.get((kind, origin))
        if session is None:
            # Only Dify's own server may go unverified.
            verify = connection.verify if is_own or connection.verify is not False else True
            headers = connection.headers if is_dify else {}
            session = kind.join(replace(connection, api_key="", base_url=origin, verify=verify, headers=headers))
            self._sessions[kind, origin] = session
            self._stack.push_async_callback(session.leave)
        return session


async def _receive(response: aiohttp.ClientResponse, expected: int | None, sink: _Sink) -> None:
    received, buffer = 0, bytearray()
    async for piece in response.content.iter_any():
        received += len(piece)
        buffer += piece
        if expected is not None and received > expected:
            break
        if len(buffer) >= CHUNK:
            await asyncio.to_thread(sink.write, bytes(buffer))
            buffer.clear()
    if expected is not None and received != expected:
        raise DifyFilesError(
            f"The file at {_shown(str(response.url))} has not the {expected:,} bytes that Dify said: {received:,} came."
        )
    await asyncio.to_thread(partial(sink.write, bytes(buffer), is_last=True))


def _refusal(first: str, url: str, status: int) -> DifyError:
    signed_at = _signed_at(first)
    age = None if signed_at is None else time.time() - signed_at
    if status in (408, 429) or status >= 500:
        return DifyFilesError(f"HTTP {status}: the file at {_shown(url)} could not be downloaded.")
    if age is not None and age >= LIFETIME_SECONDS:
        return DifyFilesLost(
            f"HTTP {status}: the URL of the file at {_shown(url)} expired {LIFETIME_SECONDS} s after the run's end, "
            f"{age:.0f} s after it was signed. Dify doesn't sign it again."
        )
    return DifyFilesLost(
        f"HTTP {status}: Dify does not give the file at {_shown(url)}. It is gone, or FILES_ACCESS_TIMEOUT is shorter "
        f"than {LIFETIME_SECONDS} s there."
    )


def _signed_at(url: str) -> float | None:
    """Return when Dify signed a URL, in epoch seconds."""
    found = re.fullmatch(r"\d{1,12}", parse_qs(urlsplit(url).query).get("timestamp", [""])[0])
    return float(found[0]) if found else None


def _joined(base: str, url: str) -> str:
    """Return a URL that may be relative; raise a DifyFilesLost for what two readers might take for two servers."""
    with suppress(ValueError):
        whole = urljoin(base, url)
        parts = urlsplit(whole)
        if re.fullmatch(r"[^\x00-\x20\x7f\\]+", whole) and "@" not in parts.netloc and parts.port != 0:
            return whole
    # Not shown: what stands before an @ may be a secret.
    raise DifyFilesLost("Dify gave a malformed URL for a file, or something in front of Dify did.")


def _shown(url: str) -> str:
    """Return a URL without its signature."""
    return one_line(url.partition("?")[0], 200)
