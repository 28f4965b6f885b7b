"""How Sphinx makes the documentation's pages: ``make docs``."""

from __future__ import annotations

import os
import re
import tempfile
from typing import TYPE_CHECKING

from airflow_provider_dify import __version__

if TYPE_CHECKING:
    from sphinx.application import Sphinx

# Airflow, which autodoc imports, writes a configuration there.
_airflow_home = tempfile.TemporaryDirectory(prefix="airflow-home-")
os.environ["AIRFLOW_HOME"] = _airflow_home.name

project = "airflow-provider-dify"
author = "the contributors of airflow-provider-dify"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"{project} {version}"
html_copy_source = False
myst_heading_anchors = 3
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
# A reference to anything of this package must lead somewhere; those to Airflow, requests, ... need not.
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!airflow_provider_dify).*")]

_PAGES = re.compile(r"^\d+\. \[[^]]+\]\(([\w-]+)\.md\)", re.MULTILINE)


def order_pages(app: Sphinx, page: str, source: list[str]) -> None:
    """Make the numbered list of index.md, which reads well everywhere, the order of the pages as well."""
    if page == "index":
        source[0] += "\n```{toctree}\n:hidden:\n\n" + "\n".join(_PAGES.findall(source[0])) + "\n```\n"


def setup(app: Sphinx) -> None:
    """Tell Sphinx of it."""
    app.connect("source-read", order_pages)
