"""Follow every link, picture and anchor between the pages of a built site: ``check_site.py build/docs``."""

from __future__ import annotations

import os
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """A page's anchors, and the addresses that it links to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.targets: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Collect the ids and the addresses of a tag."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.targets.append(value)


def find_broken_links(site: Path, prefix: str = "/") -> list[str]:
    """
    Follow the links of all pages of a site, as far as they lead to the site itself.

    :param site: the folder of the built site.
    :param prefix: the path that the site will have on its server, which absolute links begin with.
    :return: a line for each link that leads nowhere.
    """
    pages = {path: Page(path) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        for target in page.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc or target.startswith("data:"):
                continue
            # The links of the page for missing pages are absolute.
            start = site if url.path.startswith(prefix) else path.parent
            leads_to = (start / unquote(url.path).removeprefix(prefix)).resolve() if url.path else path
            if leads_to.is_dir():
                leads_to /= "index.html"
            anchor = unquote(url.fragment)
            found = pages.get(leads_to)
            if not leads_to.exists() or (anchor and found is not None and anchor not in found.anchors):
                broken.append(f"{path.relative_to(site)}: {target}")
    return broken


def main() -> None:
    """Check the site that is named on the command line."""
    site = Path(sys.argv[1]).resolve()
    broken = find_broken_links(site, urlsplit(os.environ.get("READTHEDOCS_CANONICAL_URL", "")).path or "/")
    if broken:
        sys.exit("These links lead nowhere:\n" + "\n".join(broken))
    if not (site / "objects.inv").exists() or not (site / "404.html").exists():
        sys.exit("The site has no objects.inv or no 404.html.")
    print(f"{len(list(site.rglob('*.html')))} pages, all links between them lead somewhere.")


if __name__ == "__main__":
    main()
