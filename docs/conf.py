"""How Sphinx builds the documentation: ``make docs``."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from docutils import nodes

from airflow_provider_dify import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# The address of the repository that the pages are built from, for the edit links. Without it there are none.
REPOSITORY = os.environ.get("REPOSITORY_URL", "")
# Where the site will be, as Read the Docs says it.
SITE = os.environ.get("READTHEDOCS_CANONICAL_URL", "")

# Airflow, which autodoc imports, writes a configuration there.
_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
os.environ["AIRFLOW_HOME"] = _airflow_home.name

project = "airflow-provider-dify"
author = "the contributors of airflow-provider-dify"
project_copyright = f"{author}. Apache License 2.0. Apache Airflow, Airflow and Dify are trademarks of their owners"
version = release = __version__

extensions = ["myst_parser", "notfound.extension", "sphinx.ext.autodoc", "sphinx_copybutton", "sphinx_design"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
# The pages in docs/ are read in the repository, too, so they have no directives. A page of the same name in this folder
# takes a page's place on the site.
SITE_PAGES = Path(__file__).parent / "_site"
exclude_patterns = [SITE_PAGES.name]

# A picture that the repository shows in the reader's theme; the site's own theme may be another one.
PICTURE = re.compile(r'<picture>\n  <source .* srcset="(.+)">\n  <img alt="(.+)" src="(.+)">\n</picture>')
PICTURE_ON_SITE = """```{image} \\3
:alt: \\2
:class: only-light
```

```{image} \\1
:alt: \\2
:class: only-dark
```"""

html_theme = "furo"
html_title = f"{project} {version}"
html_short_title = project
html_baseurl = SITE
html_copy_source = False
html_show_sphinx = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_theme_options = {
    "top_of_page_buttons": ["view", "edit"] if REPOSITORY else [],
    **({"source_repository": REPOSITORY, "source_branch": "main", "source_directory": "docs/"} if REPOSITORY else {}),
}
# The missing page may be at any depth, so its links are absolute.
notfound_urls_prefix = urlsplit(SITE).path or "/"
notfound_context = {
    "title": "Page not found",
    "body": "<h1>Page not found</h1><p>This page is not here any more, or never was. Use the search, or go to "
    f'<a href="{notfound_urls_prefix}index.html">the first page</a>. For the message of a failed task, see '
    f'<a href="{notfound_urls_prefix}failures.html">Failures</a>.</p>',
}

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# Names without their modules: these are too long for the sidebar.
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries_show_parents = "hide"
# A reference to anything of this package must lead somewhere; those to Airflow, requests, ... need not.
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!airflow_provider_dify).*"),
    # Rooms of the package that are not public.
    ("py:.*", r"airflow_provider_dify\.(api|runs)\..*"),
    ("py:class", r".*\.(T|_ResponseError)"),
]


def use_site_page(app: Sphinx, docname: str, source: list[str]) -> None:
    """Replace a page's text by what stands in its place on the site, and its pictures by one for each theme."""
    page = SITE_PAGES / f"{docname}.md"
    if page.exists():
        source[0] = page.read_text(encoding="utf-8")
    source[0] = PICTURE.sub(PICTURE_ON_SITE, source[0])


def label_cells(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give each cell of a table its column's heading, which a phone shows above the cell."""
    for table in doctree.findall(nodes.table):
        headings = [entry.astext() for head in table.findall(nodes.thead) for entry in head.findall(nodes.entry)]
        for body in table.findall(nodes.tbody):
            for row in body.findall(nodes.row):
                for heading, entry in zip(headings, row.findall(nodes.entry), strict=True):
                    if heading and entry.astext().strip():
                        entry.insert(0, nodes.container("", nodes.Text(heading), classes=["column-heading"]))


def setup(app: Sphinx) -> None:
    """Tell Sphinx of both."""
    app.connect("source-read", use_site_page)
    app.connect("doctree-resolved", label_cells)
