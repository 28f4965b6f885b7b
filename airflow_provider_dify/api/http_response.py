# SPDX-License-Identifier: Apache-2.0
"""One whole HTTP response, whichever client received it, and typed access to its fields."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NoReturn

from airflow_provider_dify.api.connection import DifyConnection, name_connection
from airflow_provider_dify.api.models import EXCERPT_LENGTH, WorkflowRunStatus, as_text, one_line, redact
from airflow_provider_dify.exceptions import DifyConnectionError

if TYPE_CHECKING:
    from pendulum import DateTime


# A shorter key is a test's, and could be part of a word.
_SHORTEST_KEY_IN_A_BODY = 8
# What urllib3 says of its own object, in front of what went wrong.
_ADDRESS = re.compile(r"<[\w.]+ object at 0x[0-9a-f]+>:? ?")
# What Python refuses from 3.13 on, in OpenSSL's words.
_STRICT_TLS = re.compile(
    "Missing (Authority|Subject) Key Identifier|does not include key usage extension|not marked critical"
)


@dataclass(frozen=True)
class HttpResponse:
    """One whole HTTP response, without the API key wherever a server may have echoed it."""

    status_code: int
    headers: Mapping[str, str]
    body: bytes  # content encoding undone
    url: str
    conn_id: str  # for messages; empty for a connection that has no name yet
    secrets: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def received(
        cls, connection: DifyConnection, url: str, status_code: int, headers: Mapping[str, str], body: bytes
    ) -> HttpResponse:
        """Return what a client received, as the rest of this package reads it."""
        body = without_key(body, connection.api_key)
        return cls(status_code, headers, body, url, connection.conn_id, connection.secrets)

    @property
    def connection_name(self) -> str:
        """The connection, in the middle of a message."""
        return name_connection(self.conn_id)

    @property
    def server_version(self) -> str | None:
        """Dify's version, which each of its responses names; ``None`` where something else responded."""
        version = self.header("X-Version")
        return self.shown(version, 30) if version else None

    @property
    def is_of_dify(self) -> bool:
        """
        Whether Dify itself responded, and not a gateway, a proxy or a login page in front of it. Each of Dify's
        responses has ``X-Version`` (1.12.1 to 1.17, also its HTML pages), which a proxy may remove; its errors are
        objects with ``code``, ``message`` and the HTTP status.
        """
        if self.header("X-Version"):
            return True
        data = self.json_object() or {}
        has_texts = all(isinstance(data.get(name), str) for name in ("code", "message"))
        return has_texts and data.get("status") == self.status_code

    def header(self, name: str) -> str | None:
        """Return a header's value, or ``None``."""
        wanted = name.lower()
        return next((value for key, value in self.headers.items() if key.lower() == wanted), None)

    def shown(self, text: object, limit: int = EXCERPT_LENGTH) -> str:
        """Return a text of the response as a message may show it: redacted, printable, in one line."""
        # Redacted before it is cut, so that no half of a key survives at the end.
        return one_line(redact(as_text(text)[:65536], self.secrets), limit)

    def json_object(self) -> dict[str, Any] | None:
        """Return the body as a JSON object; ``None`` where it is anything else."""
        try:
            decoded = json.loads(self.body)
        except (ValueError, RecursionError):
            return None
        return decoded if isinstance(decoded, dict) else None

    def excerpt(self) -> str:
        """Return in one line what came: status, content type and the first characters of the body."""
        content_type = self.shown(self.header("Content-Type") or "no content type")
        text = self.shown(self.body[:65536].decode("utf-8", "replace"))
        return f"HTTP {self.status_code}, {content_type}, {repr(text) if text else 'an empty body'}"

    def retry_after(self) -> float | None:
        """Return the seconds of the header ``Retry-After``, which proxies send; ``None`` where it means nothing."""
        value = (self.header("Retry-After") or "").strip()
        try:
            if value.isascii() and value.isdigit():
                return float(value[:12])
            until = parsedate_to_datetime(value)
            if until.tzinfo is None:
                until = until.replace(tzinfo=timezone.utc)
            return max(0.0, (until - datetime.now(timezone.utc)).total_seconds())
        except (ValueError, TypeError, OverflowError, IndexError):
            return None


def without_key(data: bytes, api_key: str) -> bytes:
    """Return a server's bytes, a body or a part of a stream, with ``***`` in place of the API key."""
    return data.replace(api_key.encode(), b"***") if len(api_key) >= _SHORTEST_KEY_IN_A_BODY else data


def no_response(connection: DifyConnection, subject: str, url: str, error: BaseException) -> DifyConnectionError:
    """Return the error for a request that got no response; ``subject`` stands in the middle of a message."""
    reason = reason_of(error, connection.secrets)
    lack = _STRICT_TLS.search(str(error))
    hint = (
        f"Python 3.13 and later refuse the certificate ({lack[0]}). Have it made anew (openssl: "
        "authorityKeyIdentifier=keyid), or run Airflow on Python 3.12."
        if lack
        else ""
    )
    return DifyConnectionError(f"{reason}: Dify could not be reached for {subject} at {url}. {hint}".rstrip())


def reason_of(error: BaseException, secrets: Iterable[str]) -> str:
    """Return a foreign exception as a message may show it: its type and its text, in one line, without secrets."""
    text = one_line(redact(_ADDRESS.sub("", str(error)[:65536]), secrets), 300)
    return f"{type(error).__name__}{f': {text}' if text else ''}"


# What a run's `error` may hold as an XCom: a stack trace, not a document.
_TEXT_LENGTH = 20_000
_STATUS_LENGTH = 50
# A UUID has 36.
_ID_LENGTH = 100


@dataclass(frozen=True)
class Fields:
    """The fields of one JSON object; ``subject`` is what was requested, in the middle of a message."""

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
        with suppress(OverflowError):
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                return float(value)
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
        with suppress(ValueError, TypeError, OverflowError, OSError, IndexError):
            if isinstance(value, str):
                return pendulum.instance(parsedate_to_datetime(value), tz="UTC").in_timezone("UTC")
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                return pendulum.from_timestamp(value)
        return self._raise_wrong(name, "epoch seconds, RFC 822 text or null")

    def _raise_wrong(self, name: str, expected: str) -> NoReturn:
        value = self.data.get(name)
        text = repr(value) if isinstance(value, str) else value
        shown = self.response.shown(text) if name in self.data else "nothing"
        raise DifyConnectionError(
            f"The field {name!r} must be {expected}, but it is {shown}: this provider cannot read the response for "
            f"{self.subject} at {self.response.url}. Either it is not Dify that responded, or a version of Dify that "
            "this provider does not know yet.",
            status_code=self.response.status_code,
            server_version=self.response.server_version,
        )
