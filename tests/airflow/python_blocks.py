"""The Python blocks of README and docs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the lines before it left empty, so that an error names the page's own line."""

    page: Path
    line: int
    code: str

    @property
    def name(self) -> str:
        """Return a name for a file with this block."""
        return f"{self.page.stem.lower().replace('-', '_')}_{self.line}"

    @property
    def dag_id(self) -> str | None:
        """Return the id of its Dag; ``None`` if it is no Dag file."""
        found = re.search(r"^@dag\b.*?^def (\w+)", self.code, re.M | re.S)
        return found[1] if found else None


def _python_blocks() -> Iterator[Block]:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            before = text[: found.start(1)].count("\n")
            yield Block(page, before, "\n" * before + found[1])


BLOCKS = list(_python_blocks())
