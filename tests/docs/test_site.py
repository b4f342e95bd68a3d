"""The site that mkdocs makes of docs/: strict, without a network, complete, and with nothing of other hosts in it."""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.kit.places import ROOT

pytestmark = pytest.mark.slow

LOADED = {
    "script": ["src"], "link": ["href"], "img": ["src", "srcset"], "source": ["src", "srcset"], "iframe": ["src"],
    "object": ["data"], "video": ["src"], "audio": ["src"],
}  # fmt: skip
"""What a browser fetches without being asked."""


class Page(HTMLParser):
    """What a page loads, where its navigation leads, and its anchors."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.navigation: list[str] = []
        self.anchors: set[str] = set()
        self.asks = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.loads += [value for name, value in given.items() if name in LOADED.get(tag, [])]
        self.anchors.add(given.get("id", ""))
        classes = given.get("class", "").split()
        if tag == "a" and "md-nav__link" in classes and "#" not in given["href"]:
            self.navigation.append(given["href"])
        if given.get("data-md-component") == "source" or "mermaid" in classes:
            self.asks += tag  # the theme's script asks the code host for stars, a CDN for the library


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, made where every connection goes to a closed port; and not into build/site."""
    folder = tmp_path_factory.mktemp("site")
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT, env={**os.environ, **proxies, "no_proxy": "", "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """Path below the site -> the page."""
    return {str(file.relative_to(site)): Page(file) for file in site.rglob("*.html")}


def test_no_page_loads_anything_from_another_host(site: Path, pages: dict[str, Page]) -> None:
    """Scripts, styles, fonts, pictures; and the theme's script has no reason to ask for anything."""
    loads = [(name, url) for name, page in pages.items() for url in page.loads]
    assert {".js", ".css", ".svg"} <= {Path(urlsplit(url).path).suffix for _, url in loads}
    assert [load for load in loads if urlsplit(load[1]).netloc] == []
    assert [name for name, page in pages.items() if page.asks] == []
    for file in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\s*[\"']?(https?:)?//", file.read_text(encoding="utf-8")), file


def test_every_page_of_the_docs_is_in_index_and_navigation(pages: dict[str, Page]) -> None:
    """In the same order: docs/README.md is the index where pages are read as Markdown."""
    docs = ROOT / "docs"
    there = {str(path.relative_to(docs)) for path in docs.rglob("*.md")}
    index = re.findall(r"^\| \[.+?\]\(([\w/-]+\.md)\)", (docs / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(["README.md", *index]) == sorted(there)
    shown = [
        re.sub(r"\bindex$", "README", name.removesuffix(".html")) + ".md" for name in pages["index.html"].navigation
    ]
    assert list(dict.fromkeys(shown)) == ["README.md", *index]


def exported() -> Iterator[tuple[str, str]]:
    """Module and name, for each name in the ``__all__`` of a module of the package."""
    places = {f"{folder}/": ROOT / folder for folder in ("producer", "protocol", "recovery", "workers")}
    for prefix, folder in {"": ROOT / "src" / "perdure", **places}.items():
        for path in sorted(folder.rglob("*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                    module = f"perdure/{prefix}{path.relative_to(folder).with_suffix('')}".removesuffix("/__init__")
                    yield from ((module.replace("/", "."), name) for name in ast.literal_eval(node.value))


def test_every_public_name_has_an_anchor(site: Path, pages: dict[str, Page]) -> None:
    """Under the path from which it is imported; of a class also its own methods, which have a docstring therefore."""
    inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    places = {}
    for line in zlib.decompress(inventory).decode().splitlines():
        name, _, _, place, _ = line.split(" ", 4)
        page, _, anchor = place.replace("$", name).partition("#")
        assert anchor in pages[page].anchors, line
        places[name] = page
    names = [*exported(), *(("perdure.protocol.errors", name) for name in _errors())]
    assert len({module for module, _ in names}) > 5
    for module, name in names:
        value = getattr(importlib.import_module(module), name)
        if not name.startswith("__"):
            assert f"{module}.{name}" in places, f"{module}.{name} is on no page of docs/reference"
        for member in _own(value) if isinstance(value, type) else ():
            assert f"{value.__module__}.{name}.{member}" in places, f"{module}.{name}.{member} has no docstring"


def _errors() -> list[str]:
    module = importlib.import_module("perdure.protocol.errors")
    return [
        name for name, value in vars(module).items() if inspect.isclass(value) and value.__module__ == module.__name__
    ]


def _own(kind: type) -> list[str]:
    """Public methods and properties that no base of the class has."""
    bases = {name for base in kind.__mro__[1:] for name in vars(base)}
    described = (classmethod, staticmethod, property)
    return [
        name
        for name, value in vars(kind).items()
        if not name.startswith("_")
        and name not in bases
        and (inspect.isfunction(value) or isinstance(value, described))
    ]


def test_no_markup_of_docstrings_is_left(site: Path) -> None:
    """A role, or the colons in front of a literal block, that docs/docstrings.py has not seen."""
    read = [file.read_text(encoding="utf-8") for file in (site / "reference").glob("*.html")]
    assert len(read) > 5
    for text in read:
        assert not (left := re.findall(r".*:[a-z]+:`.*|.*:[a-z]+:<code.*|.*::</p>", text)), left
