"""The page Failures: its messages by section, and whether a message is one of the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FAILURES = (ROOT / "docs" / "failures.md").read_text(encoding="utf-8")
# A row must name at least so much of a message that it can be distinguished from others.
SHORTEST = len(" is no port")


def messages_of_the_table() -> list[str]:
    tables = re.findall(r"^\| message begins with .*\n\|[ -|]+\n((?:\|.*\n)+)", FAILURES, re.M)
    rows = [row for table in tables for row in table.splitlines()]
    messages = [re.match(r"\| `([^`]+)` \| [^|]+ \| [^|]+ \|$", row) for row in rows]
    assert all(messages), [row for row, message in zip(rows, messages, strict=True) if not message]
    return [message[1] for message in messages if message]


def template(node: ast.AST) -> str | None:
    """Return a text of the sources with ``…`` for what is filled in."""
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%(\.\d+)?[sdrfg]", "…", node.value)
    return None


def sources() -> Iterator[ast.AST]:
    for path in (ROOT / "airflow_provider_dify").rglob("*.py"):
        yield from ast.walk(ast.parse(path.read_text(encoding="utf-8")))


TEXTS = {text for node in sources() if (text := template(node))}


def begins_as(message: str, text: str) -> bool:
    """Return whether a row's message is the beginning of a text whose places are filled in."""
    first, *pieces = re.split("…+", text)
    if not message.startswith(first):
        return len(message) >= SHORTEST and first.startswith(message)
    rest, named = message.removeprefix(first), len(first)
    for piece in pieces:
        # A place that is filled in has a character at least.
        _, found, after = rest[1:].partition(piece) if piece else (rest, "", "")
        if not found:
            cut = max((cut for cut in range(1, len(piece)) if rest[1:].endswith(piece[:cut])), default=0)
            # It ends in this piece, or in the place before: in other words of the package, or in Dify's.
            in_place = rest.startswith("HTTP ") or ("…" not in rest and any(rest in other for other in TEXTS))
            return named + cut >= SHORTEST and (cut > 0 or in_place)
        rest, named = after, named + len(piece)
        if not rest:
            break
    return not rest and named >= SHORTEST


def sections() -> dict[str, set[str]]:
    """Return the sections of the page by the messages that their tables have."""
    found: dict[str, set[str]] = {}
    for part in re.split(r"^## ", FAILURES, flags=re.M)[1:]:
        section = re.sub(r"[^\w\- ]", "", part.splitlines()[0].lower()).replace(" ", "-")
        for message in re.findall(r"^\| `([^`]+)` \|", part, re.M):
            found.setdefault(message, set()).add(section)
    return found
