"""Exit with an error if a page leads nowhere, needs a network, or hides something from a reader who cannot see.

    python tools/check_links.py FOLDER
"""
import re
import sys
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "embed": "src", "object": "data"}
STYLED = re.compile(r"url\(\s*['\"]?((?:https?:)?//[^)'\"]+)|@import\s+['\"]?(https?:[^;'\"]+)")
LOADED_RELS = {"stylesheet", "icon", "preload", "modulepreload", "manifest"}


class Page(HTMLParser):
    """What a page is made of, as far as it matters here."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loads, self.ids, self.flaws, self.styles = [], [], set(), [], []
        self.inside = None
        self.feed(text)
        if "html" not in self.ids:
            self.flaws.append("no <html lang=...>")

    def handle_starttag(self, tag, attributes):
        at = dict(attributes)
        self.ids |= {at[name] for name in ("id", "name") if at.get(name)}
        self.inside = tag
        if tag == "html" and at.get("lang"):
            self.ids.add("html")
        if tag == "img" and not (at.get("alt") or "").strip():
            self.flaws.append(f"picture without alternative text: {at.get('src', '')[:60]}")
        if tag == "a" and at.get("href"):
            self.links.append(at["href"])
        if at.get(LOADED.get(tag)):
            self.loads.append(at[LOADED[tag]])
        if tag == "link" and set((at.get("rel") or "").split()) & LOADED_RELS:
            self.loads.append(at.get("href", ""))
        if at.get("style"):
            self.styles.append(at["style"])

    def handle_data(self, data):
        if self.inside == "style":
            self.styles.append(data)


@cache
def parsed(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def target(page: Path, link: str) -> str | None:
    """Why a link to a place in the same folder leads nowhere; None if it does lead somewhere."""
    parts = urlsplit(link)
    path = page if not parts.path else (page.parent / unquote(parts.path))
    if not path.is_file():
        return f"no such file: {link[:80]}"
    if parts.fragment and path.suffix == ".html" and unquote(parts.fragment) not in parsed(path.resolve()).ids:
        return f"no such place: {link[:80]}"


def flaws(folder: Path) -> list[str]:
    """What is wrong with the pages under a folder, one line each."""
    found = []
    for path in sorted(folder.rglob("*.html")):
        page = parsed(path.resolve())
        wrong = list(page.flaws)
        for link in page.links + page.loads:
            scheme = urlsplit(link).scheme
            if link.startswith("//") or scheme in ("http", "https"):
                wrong += [f"loaded from a network: {link[:80]}"] if link in page.loads else []
            elif not scheme and path.name != "404.html":  # its links count from the top of a server
                wrong += filter(None, [target(path, link)])
        for address in STYLED.findall(" ".join(page.styles)):
            wrong.append(f"loaded from a network: {''.join(address)[:80]}")
        found += [f"{path.relative_to(folder)}: {flaw}" for flaw in dict.fromkeys(wrong)]
    return found


def main(folder: str) -> int:
    pages = list(Path(folder).rglob("*.html"))
    if not pages:
        print(f"no pages in {folder}")
        return 1
    found = flaws(Path(folder))
    print(*found, f"{len(pages)} pages, {len(found)} flaws", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
