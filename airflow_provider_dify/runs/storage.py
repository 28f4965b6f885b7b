# SPDX-License-Identifier: Apache-2.0
"""How files are reached on any storage: through Airflow's ``ObjectStoragePath``; each fault becomes a DifyError."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from airflow_provider_dify.api.models import one_line, redact
from airflow_provider_dify.exceptions import BATCH_SECTION, DifyConfigurationError, DifyError

# What no retry changes: no such file, no such storage, or its package isn't installed.
_PERMANENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError, ValueError, ImportError)


def storage_path(path: str | os.PathLike[str]) -> Any:
    """Return Airflow's ``ObjectStoragePath`` for a local path, or for a URL such as ``s3://connection@bucket/key``."""
    from airflow.providers.common.compat.sdk import ObjectStoragePath

    with storage_errors(path, "reached"):
        found = path if isinstance(path, ObjectStoragePath) else ObjectStoragePath(os.fspath(path))
        # Looked up late by Airflow itself.
        assert found.fs is not None  # noqa: S101
        return found


def is_same_file(one: Any, other: Any) -> bool:
    """Return whether two paths of :func:`storage_path` name one file of one storage."""
    names = {path.fs._strip_protocol(path.path) for path in (one, other)}
    return bool(one.fs == other.fs) and len(names) == 1


@contextmanager
def open_text(path: str | os.PathLike[str], *, newline: str) -> Iterator[Any]:
    """Open a text file as a stream; a byte order mark is skipped, and what is no UTF-8 becomes surrogate escapes."""
    found = storage_path(path)
    with (
        storage_errors(path, "read"),
        open_stream(found, "r", encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file,
    ):
        yield file


def open_stream(path: Any, mode: str, **options: Any) -> Any:
    """Open a path of a storage without Airflow's own wrapper, which costs a line as much as parsing it does."""
    return path.fs.open(path.path, mode, **{"encoding": "utf-8", **options})


@contextmanager
def storage_errors(path: object, verb: str) -> Iterator[None]:
    """Turn what a storage raises into a DifyError, and what no retry changes into a DifyConfigurationError."""
    try:
        yield
    except DifyError:
        raise
    except Exception as error:
        # Storages are packages of others, with errors of their own.
        reason = one_line(redact(f"{type(error).__name__}: {error}", ()), 300)
        shown = one_line(redact(str(path), ()), 200)
        error_type = DifyConfigurationError if isinstance(error, _PERMANENT) else DifyError
        raise error_type(f"{reason}: {shown!r} could not be {verb}.").explained_in(BATCH_SECTION) from error
