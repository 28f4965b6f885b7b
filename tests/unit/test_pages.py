"""README and docs as the repository shows them: plain Markdown, with the examples, and a way to each page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from markdown_it import MarkdownIt

from tests.airflow.python_blocks import EXAMPLE, PAGES, ROOT, with_examples
from tests.dify_stand_in.recordings import VERSIONS

if TYPE_CHECKING:
    from markdown_it.token import Token

DOCS = ROOT / "docs"
# Where the site's navigation is.
INDEX = (DOCS / "_site" / "index.md").read_text(encoding="utf-8")
TREES = {
    caption: names.split()
    for caption, names in re.findall(r"^```\{toctree\}\n:hidden:\n:caption: ([^\n]+)\n\n(.*?)^```$", INDEX, re.M | re.S)
}
# What Sphinx reads, and CommonMark shows as it stands: :::, {role}`...`, (target)=, an attribute, a row of no table.
DIRECTIVE = re.compile(r"^\s*:{3,}|\{[\w:-]+\}$|^\([\w-]+\)=$|^:[\w-]+: |^\{[.#%]|^\| |^\.\. ", re.M)

# The only HTML of a page: a screenshot for each theme of the reader.
PICTURE = re.compile(
    r'<picture>\n  <source media="\(prefers-color-scheme: dark\)" srcset="((?:docs/)?images/[\w-]+)-dark\.png">\n'
    r'  <img alt="[^"]+" src="\1\.png">\n</picture>\n'
)


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def plain(page: str) -> list[Token]:
    """Read a page as the repository does: CommonMark with tables."""
    return MarkdownIt("commonmark").enable("table").parse(page)


def directives(page: str) -> list[str]:
    """Return what a page has that only Sphinx understands."""
    found = []
    for token in plain(page):
        if token.type in ("fence", "code_block"):
            found += [token.info] if token.info.startswith("{") else []
        elif token.type == "html_block":
            found += [] if PICTURE.fullmatch(token.content) else [token.content]
        elif token.type == "inline":
            # An inline code that follows a role's name in braces.
            found += [child.content for child in token.children or () if child.type == "html_inline"]
            words = "".join(child.content if child.type == "text" else "\n" for child in token.children or ())
            found += [match[0] for match in DIRECTIVE.finditer(words)]
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_plain_commonmark(page: Path) -> None:
    assert directives(text(page)) == []


@pytest.mark.parametrize(
    "syntax",
    [
        "```{literalinclude} a.py\n```",
        ":::{grid-item-card} Start\n:::",
        "::::{grid} 1 1 3 3\n::::",
        "See {doc}`waiting`.",
        "(target)=\n# Heading",
        ".. note:: Text",
        "| a | b |\n | --- |\n| 1 | 2 |",
        "<div>text</div>",
    ],
)
def test_what_only_the_site_understands_is_found(syntax: str) -> None:
    assert directives(f"A paragraph.\n\n{syntax}\n") != []


def test_the_pages_of_the_site_have_directives() -> None:
    pages = sorted((DOCS / "_site").glob("*.md"))
    assert all(directives(text(page)) for page in pages)
    assert all((DOCS / page.name).exists() for page in pages)


def test_every_screenshot_is_on_a_page_in_both_themes_and_of_one_size() -> None:
    pages = [*PAGES, DOCS / "_site" / "index.md"]
    shown = {Path(found[1]).name for page in pages for found in PICTURE.finditer(text(page))}
    sizes = {path.stem: path.read_bytes()[16:24] for path in (DOCS / "images").glob("*.png")}
    assert sizes.keys() == shown | {f"{name}-dark" for name in shown}
    assert all(sizes[name] == sizes[f"{name}-dark"] for name in shown)
    assert not [page.name for page in pages if re.search(r"!\[.*\]\(", text(page))]


# --- navigation


def title(name: str) -> str:
    return text(DOCS / f"{name}.md").splitlines()[0].removeprefix("# ")


def test_every_page_is_in_the_navigation_of_the_site() -> None:
    listed = [name for names in TREES.values() for name in names]
    assert sorted(listed) == sorted(page.stem for page in DOCS.glob("*.md") if page.stem != "index")


def test_the_first_page_lists_all_pages_as_the_site_does() -> None:
    sections = re.findall(r"^## (.+)\n\n((?:- .+\n)+)", text(DOCS / "index.md"), re.M)
    assert {caption: re.findall(r"^- \[.+?\]\((.+?)\.md\)", items, re.M) for caption, items in sections} == TREES
    titles = re.findall(r"^- \[(.+?)\]\((.+?)\.md\)", text(DOCS / "index.md"), re.M)
    assert [shown for shown, _ in titles] == [title(name) for _, name in titles]


@pytest.mark.parametrize(("caption", "name"), [(caption, name) for caption in TREES for name in TREES[caption]])
def test_a_page_begins_with_the_way_to_the_others(caption: str, name: str) -> None:
    links = [f"**{title(other)}**" if other == name else f"[{title(other)}]({other}.md)" for other in TREES[caption]]
    way = f"[All pages](index.md) / {caption}: {', '.join(links)}"
    assert text(DOCS / f"{name}.md").splitlines()[2] == way


# --- examples


def test_every_example_is_on_a_page() -> None:
    shown = {found["file"] for page in PAGES for found in EXAMPLE.finditer(text(page))}
    assert shown == {path.name for path in (ROOT / "example_dags").glob("*.py")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_an_example_on_a_page_is_what_its_file_has(page: Path) -> None:
    hint = "python -m tests.airflow.python_blocks writes the examples again"
    assert text(page) == with_examples(text(page)), hint
    fences = len(re.findall(r"^From \[`example_dags/", text(page), re.M))
    assert fences == len(EXAMPLE.findall(text(page)))


# --- figures

DATE = re.compile(r"\b(?:Measured|estimated|measured) on\s20\d\d-\d\d-\d\d\b")
NAMED = re.compile(r"\b(Airflow|Python|Dify) (\d+(?:\.\d+)+)(?: and (\d+(?:\.\d+)+))?")
# Figures are the cells that are aligned to the right.
FIGURES = re.compile(r"^\|(?: ---:? \|)* ---: \|", re.M)


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def lowest_supported() -> dict[str, tuple[int, ...]]:
    airflows = [path.stem.split("-")[1] for path in (ROOT / "constraints").glob("airflow-*.txt")]
    return {"Airflow": min(map(numbers, airflows)), "Python": (3, 10), "Dify": min(map(numbers, VERSIONS))}


def paragraphs() -> list[tuple[str, str]]:
    return [(page.name, part) for page in PAGES for part in re.split(r"\n\n|\n(?=- )", text(page)) if DATE.search(part)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_table_of_figures_says_when_they_were_measured(page: Path) -> None:
    for section in re.split(r"^##+ ", text(page), flags=re.M):
        assert len(FIGURES.findall(section)) <= len(DATE.findall(section)), section.splitlines()[0]


@pytest.mark.parametrize(("page", "paragraph"), paragraphs())
def test_a_measurement_names_versions_that_are_supported_and_its_command(page: str, paragraph: str) -> None:
    if "estimated on" in paragraph:
        return
    versions = [(name, version) for name, *found in NAMED.findall(paragraph) for version in found if version]
    names = {name for name, _ in versions}
    assert names & {"Airflow", "Dify"}, page
    assert "Airflow" not in names or "`make " in paragraph, page
    lowest = lowest_supported()
    assert [(name, version) for name, version in versions if numbers(version) < lowest[name]] == []


# --- the API


def test_the_page_of_the_api_names_what_the_site_shows() -> None:
    site, page = text(DOCS / "_site" / "api.md"), text(DOCS / "api.md")
    classes = re.findall(r"^\.\. auto(?:class|function):: [\w.]+\.(\w+)$", site, re.M)
    classes += re.findall(r"^   :members: (Dify\w+)$", site, re.M)
    assert sorted(classes) == sorted(re.findall(r"`(\w+)`", "".join(re.findall(r"\[(`.+?`)\]\(", page))))
    assert re.findall(r"^## .+$", site, re.M) == re.findall(r"^## .+$", page, re.M)
