"""
The Python blocks of README and docs.

``python -m tests.airflow.python_blocks`` writes the examples on the pages again, after a change of ``example_dags/``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# A block that shows an example, below a line with the link to its file.
EXAMPLE = re.compile(
    r"(?P<before>^From \[`example_dags/(?P<file>\w+\.py)`\]\((?:\.\./)?example_dags/(?P=file)\):\n\n```python\n)"
    r"(?P<code>.*?)(?P<after>^```$)",
    re.M | re.S,
)


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
        examples = {found.start("code") for found in EXAMPLE.finditer(text)}
        for found in re.finditer(r"^```python\n(.*?)^```$", text, re.M | re.S):
            before = text[: found.start(1)].count("\n")
            if found.start(1) not in examples:
                yield Block(page, before, "\n" * before + found[1])


# Those that stand on their own; the examples are run from their files.
BLOCKS = list(_python_blocks())


def with_examples(page: str) -> str:
    """Return a page's text with its examples as their files are now."""
    return EXAMPLE.sub(lambda found: found["before"] + _excerpt(found["file"], found["code"]) + found["after"], page)


def _excerpt(file: str, shown: str) -> str:
    """Return an example from the first line that is shown on; to its end, or without the line that makes the Dag."""
    text = (ROOT / "example_dags" / file).read_text(encoding="utf-8")
    lines, last = shown.splitlines(), text.splitlines()[-1]
    start = text.index(f"{lines[0]}\n")
    end = len(text) if lines[-1] == last else text.rindex(last)
    return text[start:end].rstrip("\n") + "\n"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(with_examples(path.read_text(encoding="utf-8")), encoding="utf-8")
