"""
Check that a tag may be released: ``make check-release TAG=v1.2.3 REPOSITORY_URL=https://...``.

The tag, the package's version and the changelog must name the same version, the package must name the repository
that releases it, and no page may say that there is no release yet.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping
from importlib.metadata import metadata
from pathlib import Path

from airflow_provider_dify import __version__

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page says until the first release.
UNRELEASED = re.compile(
    r"\bno\s+release\s.{0,40}\byet\b|\bnot\s+released\s+yet\b|\bnothing\s+is\s+published\b", re.I | re.S
)


def find_problems(
    tag: str, repository_url: str, version: str, source_url: str, changelog: str, pages: Mapping[str, str]
) -> list[str]:
    """
    Compare everything that names a version or a repository.

    :param tag: the tag to release, such as ``v1.2.3``.
    :param repository_url: the address of the repository that releases; empty if it is not to be compared.
    :param version: the package's version.
    :param source_url: the repository's address in the package's metadata.
    :param changelog: the text of the changelog.
    :param pages: the texts that users read, by their names.
    :return: a sentence for each problem; empty if there is none.
    """
    problems = []
    if tag != f"v{version}":
        problems.append(f"The tag is {tag}, but the package's version is {version}: the tag must be v{version}.")
    if not re.search(rf"^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.M):
        problems.append(f"CHANGELOG.md has no heading '## [{version}] - <date>'.")
    if repository_url and repository_url != source_url:
        problems.append(f"The repository is {repository_url}, but pyproject.toml says {source_url}.")
    for name, text in pages.items():
        if found := UNRELEASED.search(text):
            problems.append(f"{name} says {' '.join(found[0].split())!r}: remove it, or say what is true from now on.")
    return problems


def main() -> None:
    """Read the arguments, the package's metadata and the changelog, and exit with what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tag")
    parser.add_argument("--repository-url", default="")
    arguments = parser.parse_args()
    urls = dict(url.split(", ", 1) for url in metadata("airflow-provider-dify").get_all("Project-URL") or [])
    problems = find_problems(
        arguments.tag,
        arguments.repository_url,
        __version__,
        urls["Source"],
        (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"),
        {str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in PAGES},
    )
    if problems:
        sys.exit("\n".join(problems))
    print(f"{arguments.tag} can be released.")


if __name__ == "__main__":
    main()
