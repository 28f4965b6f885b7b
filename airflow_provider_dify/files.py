# SPDX-License-Identifier: Apache-2.0
"""Files among the inputs of a run: where they are, and as what Dify is to take them. Needs no HTTP client."""

from __future__ import annotations

import copy
import mimetypes
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from airflow_provider_dify.exceptions import DifyConfigurationError

TYPES = ("document", "image", "audio", "video", "custom")
# What Dify makes of a name's ending: 1.12.1 to 1.16.1, `constants`, and `_standardize_file_type` of `file_factory`.
_ENDINGS = {
    "image": "jpg jpeg png webp gif svg",
    "video": "mp4 mov mpeg webm",
    "audio": "mp3 m4a wav amr mpga",
    "document": "txt markdown md mdx pdf html htm xlsx xls vtt properties doc docx csv eml msg ppt pptx xml epub",
}
_TYPE_OF_ENDING = {ending: kind for kind, endings in _ENDINGS.items() for ending in endings.split()}
# Dify cuts longer names.
_MAX_NAME = 200
# An upload's id where none is known yet.
_NO_ID = "00000000-0000-0000-0000-000000000000"


class DifyFile:
    """
    A file as the value of an input, alone or in a list: the task uploads it just before the start, as the run's user.

    :param path: path of the file, or its URL as Airflow's object storage takes it (``s3://aws_default@bucket/a.pdf``).
        Templated.
    :param url: an address that Dify itself fetches the file from, in place of ``path``. Templated.
    :param type: ``document``, ``image``, ``audio``, ``video`` or ``custom``; by the name's ending by default.
    :param mime_type: the file's type, such as ``application/pdf``; by the name's ending by default.
    :param file_name: the name that Dify sees; the path's last part by default.
    :raises DifyConfigurationError: if not one of ``path`` and ``url`` is given, or ``type`` is none of these.
    """

    # Rendered from the template each time, so that mapped tasks of one process don't share the first one's path.
    template_fields: ClassVar[tuple[str, ...]] = ("template",)

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        url: str | None = None,
        type: str | None = None,
        mime_type: str | None = None,
        file_name: str | None = None,
    ) -> None:
        if (path is None) == (url is None):
            raise DifyConfigurationError("A DifyFile needs either a path or a url.")
        if type is not None and type not in TYPES:
            raise DifyConfigurationError(f"The type of a DifyFile must be one of {', '.join(TYPES)}: {type!r:.100}")
        if mime_type is not None and not re.fullmatch(r"[\w.+-]+/[\w.+-]+( ?;[ \w.+=-]+)?", mime_type):
            raise DifyConfigurationError(f"The mime_type of a DifyFile must be such as text/plain: {mime_type!r:.100}")
        # An ObjectStoragePath names its connection in its text only.
        self.location = self._template = str(url if path is None else path)
        self.is_url = path is None
        self.size: int | None = None  # bytes, once the file was looked at
        # Of DifyFile.each: paths and sizes, once they were read.
        self.listed: list[tuple[str, int]] | None = None
        self._type, self._mime_type, self._name = type, mime_type, file_name

    @staticmethod
    def each(pattern: str | os.PathLike[str], *, field: str, **settings: Any) -> DifyFile:
        """
        Make the rows of a batch: one for each file of a folder or pattern, in the order of their names.

        :param pattern: such as ``s3://aws_default@bucket/inbox/*.pdf``; a folder stands for all files in it. Templated.
        :param field: the input that is to have the file. The input ``file_name``, if the app has it, gets the name.
        :param settings: ``type`` and ``mime_type`` of each :class:`DifyFile`.
        :return: the ``inputs`` of :class:`~airflow_provider_dify.operators.dify_batch.DifyRunWorkflowBatchOperator`.
        """
        return DifyFiles(pattern, field, settings)

    @property
    def template(self) -> str:
        """The path or URL, not rendered."""
        return self._template

    @template.setter
    def template(self, rendered: Any) -> None:
        # An object may live through several tries.
        self.location, self.listed = str(rendered), None

    @property
    def file_name(self) -> str:
        """The file's name."""
        name = self._name or re.split(r"[/\\]", self.location.partition("?")[0] if self.is_url else self.location)[-1]
        stem, ending = os.path.splitext(re.sub(r'["/\\\x00-\x1f\x7f]', "_", name or "file"))
        return (stem[: max(1, _MAX_NAME - len(ending))] + ending)[:_MAX_NAME]

    @property
    def mime_type(self) -> str:
        """The file's type. Without one Dify refuses an upload."""
        return self._mime_type or mimetypes.guess_type(self.file_name)[0] or "application/octet-stream"

    @property
    def type(self) -> str:
        """Dify's kind of file."""
        if self._type is not None:
            return self._type
        kind = _TYPE_OF_ENDING.get(os.path.splitext(self.file_name)[1][1:].lower())
        family, _, subtype = self.mime_type.partition("/")
        by_mime_type = family if family in ("image", "video", "audio") else None
        return kind or by_mime_type or ("document" if family == "text" or subtype == "pdf" else "custom")

    @property
    def limit_name(self) -> str:
        """The entry of ``system_parameters`` with the megabytes that it may have. Dify goes by the ending alone."""
        kind = _TYPE_OF_ENDING.get(os.path.splitext(self.file_name)[1][1:].lower())
        return f"{kind}_file_size_limit" if kind in ("image", "video", "audio") else "file_size_limit"

    def as_input(self, upload_file_id: str = _NO_ID) -> dict[str, str]:
        """Return the file as a start's inputs have it, with the id of its upload."""
        if self.is_url:
            return {"type": self.type, "transfer_method": "remote_url", "url": self.location}
        return {"type": self.type, "transfer_method": "local_file", "upload_file_id": upload_file_id}

    def __repr__(self) -> str:
        settings = {"type": self._type, "mime_type": self._mime_type, "file_name": self._name}
        given = "".join(f", {name}={value!r}" for name, value in settings.items() if value is not None)
        return f"DifyFile({'url=' if self.is_url else ''}{self.location!r}{given})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DifyFile) and repr(self) == repr(other)

    def __hash__(self) -> int:
        return hash(repr(self))


class DifyFiles(DifyFile):
    """The rows of a batch that :meth:`DifyFile.each` makes; its location is the pattern."""

    def __init__(self, pattern: str | os.PathLike[str], field: str, settings: Mapping[str, Any]) -> None:
        super().__init__(pattern, **settings)
        self.field = field
        self._settings = settings

    def row(self, path: str) -> dict[str, Any]:
        """Return the inputs of a file's row."""
        file = DifyFile(path, **self._settings)
        return {self.field: file, "file_name": file.file_name}

    def __repr__(self) -> str:
        return f"DifyFile.each({self.location!r}, field={self.field!r})"


def files_in(inputs: Mapping[str, Any]) -> list[DifyFile]:
    """Return the files among inputs: a value, or items of a list."""
    given = inputs.values() if isinstance(inputs, Mapping) else ()
    values = (item for value in given for item in (value if isinstance(value, (list, tuple)) else (value,)))
    return [item for item in values if isinstance(item, DifyFile)]


def with_files_as(inputs: Mapping[str, Any], replace: Callable[[DifyFile], Any]) -> Mapping[str, Any]:
    """Return inputs with something in place of each file."""
    if not files_in(inputs):
        return inputs

    def convert(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [convert(item) for item in value]
        return replace(value) if isinstance(value, DifyFile) else value

    return {name: convert(value) for name, value in inputs.items()}


def copied(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return inputs with files of their own, which nobody renders or looks at but this task."""
    return with_files_as(inputs, copy.copy)
