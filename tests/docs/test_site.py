"""The site of the documentation: built without a warning, links that lead somewhere, and nothing loaded from afar."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import hf_dynsparse
from tests.browser import chromium


ROOT = Path(__file__).parents[2]


class Places(HTMLParser):
    """What a page can be entered by, what it loads, and where it leads."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.loads: list[str] = []
        self.leads: list[str] = []
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors.add(given.get("id", ""))
        if tag == "a":
            self.leads.append(given.get("href", ""))
        elif tag != "link" or given.get("rel") in ("stylesheet", "icon"):
            self.loads += filter(None, [given.get("src"), given.get("href")])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="MkDocs is not installed: pip install 'hf_dynsparse[docs]'")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout  # MkDocs compares links and anchors of Markdown
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Places]:
    return {page: Places(page) for page in site.rglob("*.html")}


def test_pages_load_what_is_there_and_nothing_from_elsewhere(pages: dict[Path, Places]) -> None:
    for page, places in pages.items():
        if page.name != "404.html":  # of a server, with its addresses
            assert [it for it in places.loads if ":" in it or not (page.parent / it).is_file()] == [], page


def test_every_public_name_has_its_reference(pages: dict[Path, Places]) -> None:
    anchors = set().union(*(places.anchors for page, places in pages.items() if page.parent.name == "reference"))
    assert {f"hf_dynsparse.{name}" for name in hf_dynsparse.__all__} <= anchors


@pytest.mark.parametrize(
    "file", ["README.md", "CONTRIBUTING.md", "model_cards/README.md", "examples/accelerate/README.md"]
)
def test_links_from_outside(file: str, site: Path, pages: dict[Path, Places]) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links
    for link in links:
        path, _, anchor = link.partition("#")
        if ":" not in link:
            target = (ROOT / file).parent / path if path else ROOT / file
            assert target.exists(), link
            if anchor:
                page = site / target.resolve().relative_to(ROOT / "docs").with_suffix(".html")
                assert anchor in pages[page].anchors, link


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_search_finds_a_word_from_a_folder(site: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as page:
        page.call("Page.navigate", url=f"{(site / 'index.html').as_uri()}?q=coverage")
        found = page.run(
            """new Promise((found) => {
                const look = () => document.querySelectorAll(".md-search-result__item").length;
                const wait = setInterval(() => look() && (clearInterval(wait), found(look())), 50);
            })"""
        )
        assert found > 3
        assert page.complaints == []
