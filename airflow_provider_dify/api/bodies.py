"""The bodies of requests that carry a user's data: a start's inputs, and a file."""

from __future__ import annotations

import contextlib
import json
import mimetypes
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

from airflow_provider_dify.api.routes import check_user
from airflow_provider_dify.exceptions import DifyConfigurationError


def encode_start(inputs: Mapping[str, Any], user: str) -> bytes:
    """
    Return the body of a start in streaming mode.

    :param inputs: the workflow's inputs; sequences of any kind become lists, such as the outputs of a mapped task.
    :param user: who starts the run.
    :return: JSON.
    :raises DifyConfigurationError: if an argument can't be sent.
    """
    check_user(user)
    try:
        fields = {"inputs": dict(inputs), "user": user, "response_mode": "streaming"}
        return json.dumps(fields, allow_nan=False, default=_as_list).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise DifyConfigurationError(f"inputs must be an object of JSON values: {error}") from error


def _as_list(value: Any) -> list[Any]:
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return list(value)
    raise TypeError(f"{type(value).__name__} is not JSON serializable")


@contextlib.contextmanager
def open_upload(
    file: str | os.PathLike[str] | IO[bytes], file_name: str | None, mime_type: str | None
) -> Iterator[tuple[str, IO[bytes], str]]:
    """
    Open a file to upload.

    :param file: a path, or a file that is open for reading bytes, which stays open.
    :param file_name: its name; that of the file by default.
    :param mime_type: its type, without which Dify refuses the upload (415); guessed from the name by default.
    :return: name, open file and type, as ``requests`` takes them.
    :raises DifyConfigurationError: if the file can't be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            opened = stack.enter_context(open(file, "rb")) if isinstance(file, (str, os.PathLike)) else file
        except OSError as error:
            raise DifyConfigurationError(f"The file to upload cannot be read: {error}") from error
        name = file_name or os.path.basename(str(getattr(opened, "name", "file")))
        yield name, opened, mime_type or mimetypes.guess_type(name)[0] or "application/octet-stream"
