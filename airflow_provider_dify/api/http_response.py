"""One whole HTTP response, whichever client received it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

from airflow_provider_dify.connection import DifyConnection, name_connection
from airflow_provider_dify.exceptions import DifyConnectionError
from airflow_provider_dify.excerpts import EXCERPT_LENGTH, as_text, one_line, redact

# A shorter key is a test's, and could be part of a word.
_SHORTEST_KEY_IN_A_BODY = 8
# What Python refuses from 3.13 on, in OpenSSL's words.
_STRICT_TLS = re.compile(
    "Missing (Authority|Subject) Key Identifier|does not include key usage extension|not marked critical"
)


@dataclass(frozen=True)
class HttpResponse:
    """
    One whole HTTP response, without the API key wherever a server may have echoed it.

    :param status_code: HTTP status.
    :param headers: the response's headers; looked up without regard to case.
    :param body: the body's bytes, content encoding undone.
    :param url: the URL that was requested.
    :param conn_id: the Airflow connection in use, for messages; empty for one that has no name yet.
    :param secrets: the API key and proxies' passwords, which no message may show.
    """

    status_code: int
    headers: Mapping[str, str]
    body: bytes
    url: str
    conn_id: str
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
        Whether Dify itself responded, and not a gateway, a proxy or a login page in front of it.

        Each of Dify's responses has ``X-Version`` (1.12.1 to 1.17, also its HTML pages), which a proxy may remove. Its
        errors are objects with ``code``, ``message`` and the HTTP status.
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
        """
        Parse the header ``Retry-After``, which proxies send.

        :return: seconds; ``None`` where there is none, or one that means nothing.
        """
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
    """
    Return bytes of a server without the API key.

    :param data: a body, or a part of a stream.
    :param api_key: the key.
    :return: the bytes with ``***`` in place of the key.
    """
    return data.replace(api_key.encode(), b"***") if len(api_key) >= _SHORTEST_KEY_IN_A_BODY else data


def no_response(connection: DifyConnection, subject: str, url: str, error: BaseException) -> DifyConnectionError:
    """
    Return the error for a request that got no response.

    :param connection: the connection in use.
    :param subject: what was requested, in the middle of a message.
    :param url: the URL that was requested.
    :param error: what the HTTP client raised.
    """
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
    """
    Return a foreign exception as a message may show it.

    :param error: the exception.
    :param secrets: what the text must not show.
    :return: its type and its text, in one line.
    """
    text = one_line(redact(str(error)[:65536], secrets), 300)
    return f"{type(error).__name__}{f': {text}' if text else ''}"
