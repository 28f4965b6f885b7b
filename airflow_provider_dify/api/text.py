# SPDX-License-Identifier: Apache-2.0
"""Foreign text in our messages: one line, bounded, without control characters and without secrets."""

from __future__ import annotations

import re
from collections.abc import Iterable

# Enough to recognise a login page, never more than a line.
EXCERPT_LENGTH = 120
# Enough for any error text that a person can use.
REASON_LENGTH = 500

# A URL's user name and password, up to the last @ before the path.
_USERINFO = re.compile(r"//[^/\s]*@")


def one_line(text: object, limit: int = REASON_LENGTH) -> str:
    """Return a foreign text as one printable line that can't forge log lines or colour a terminal; ``…`` where cut."""
    shown = as_text(text)
    # Cut before the work, because a server may send megabytes.
    words = " ".join(shown[: limit * 8].split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words[: limit + 1])
    return line if len(line) <= limit else line[:limit] + "…"


def as_text(value: object) -> str:
    """Return a text as it is, and of anything else that JSON can hold, however deep, the ``repr``."""
    if isinstance(value, str):
        return value
    try:
        return repr(value)
    except RecursionError:
        # Parsed with less on the stack than there is here.
        return f"a {type(value).__name__} that is nested too deeply"


def redact(text: str, secrets: Iterable[str]) -> str:
    """Return a text with ``***`` for each secret (empty ones are skipped) and for user names and passwords in URLs."""
    # The longest first, because one secret may be part of another.
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, "***")
    return _USERINFO.sub("//***@", text)
