"""Typed access to the fields of a JSON response; a field of a wrong type is an error that names it."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_dify.api.http_response import HttpResponse
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.excerpts import one_line
from airflow_provider_dify.models import WorkflowRunStatus

if TYPE_CHECKING:
    from pendulum import DateTime

# What a run's `error` may hold as an XCom: a stack trace, not a document.
_TEXT_LENGTH = 20_000
_STATUS_LENGTH = 50
# A UUID has 36.
_ID_LENGTH = 100


@dataclass(frozen=True)
class Fields:
    """
    The fields of one JSON object.

    :param response: the response that it is of, for messages.
    :param subject: what was requested, in the middle of a message.
    :param data: the object.
    """

    response: HttpResponse
    subject: str
    data: dict[str, Any]

    def required_text(self, name: str) -> str:
        """Return a field that must be text."""
        value = self.text(name)
        return self._raise_wrong(name, "text") if value is None else value

    def required_id(self, name: str) -> str:
        """Return a field that must be an id; it stands in messages, so it has to be a short printable text."""
        value = self.text(name)
        is_id = value is not None and value.isprintable() and 0 < len(value) <= _ID_LENGTH
        return str(value) if is_id else self._raise_wrong(name, "an id")

    def text(self, name: str) -> str | None:
        """Return a field that is text or null, bounded."""
        value = self.data.get(name)
        if value is None:
            return None
        return value[:_TEXT_LENGTH] if isinstance(value, str) else self._raise_wrong(name, "text or null")

    def status(self) -> WorkflowRunStatus | str:
        """Return the field ``status``: a known one, or its text in a short line, because it stands in many messages."""
        text = self.required_text("status")
        try:
            return WorkflowRunStatus(text)
        except ValueError:
            return one_line(text, _STATUS_LENGTH)

    def integer(self, name: str) -> int | None:
        """Return a field that is a whole number or null."""
        value = self.data.get(name)
        if value is None or (isinstance(value, int) and not isinstance(value, bool)):
            return value
        return self._raise_wrong(name, "a whole number or null")

    def number(self, name: str) -> float | None:
        """Return a field that is a finite number or null."""
        value = self.data.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
        return self._raise_wrong(name, "a number or null")

    def json_object(self, name: str) -> dict[str, Any] | None:
        """Return a field that is an object, the JSON text of one (Dify up to 1.12), or null."""
        value = self.data.get(name)
        if isinstance(value, str):
            try:
                value = json.loads(value) if value else None
            except (ValueError, RecursionError):
                value = False
        if value is None or isinstance(value, dict):
            return value
        return self._raise_wrong(name, "an object, the JSON text of one, or null")

    def time(self, name: str) -> DateTime | None:
        """Return a field that is epoch seconds, RFC 822 text (the oldest servers), or null."""
        import pendulum  # each poll of a task needs it, a Dag file that names the sensor does not

        value = self.data.get(name)
        if value is None:
            return None
        try:
            if isinstance(value, str):
                return pendulum.instance(parsedate_to_datetime(value), tz="UTC").in_timezone("UTC")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return pendulum.from_timestamp(value)
        except (ValueError, TypeError, OverflowError, OSError, IndexError):
            pass
        return self._raise_wrong(name, "epoch seconds, RFC 822 text or null")

    def _raise_wrong(self, name: str, expected: str) -> NoReturn:
        value = self.data.get(name)
        shown = (
            self.response.shown(repr(value) if isinstance(value, str) else value) if name in self.data else "nothing"
        )
        raise DifyConnectionError(
            f"The field {name!r} must be {expected}, but it is {shown}: this provider cannot read the response for "
            f"{self.subject} at {self.response.url}. Either it is not Dify that responded, or a version of Dify that "
            "this provider does not know yet.",
            status_code=self.response.status_code,
            server_version=self.response.server_version,
        )
