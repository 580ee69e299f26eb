"""The site builds without warnings, has every page, and fetches nothing."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer

import fedmerge_peft
from fedmerge_peft.cli.federate import federate as federate_app

pytest.importorskip("properdocs", reason="needs the extra docs")

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs").rglob("*.md"))
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LARGEST = 400_000
"""Bytes of a page."""


class Page(HTMLParser):
    """Links, targets of links, and fetched addresses of one page."""

    def __init__(self, path):
        super().__init__()
        self.links, self.ids, self.fetched = [], set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.ids |= {attributes[key] for key in ("id", "name") if attributes.get(key)}
        address = attributes.get("src") or attributes.get("href") or ""
        if tag == "a":
            self.links.append(address)
        elif tag in ("script", "img", "iframe", "link", "source"):
            self.fetched.append(address)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "properdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site):
    return {path: Page(path) for path in sorted(site.rglob("*.html"))}


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "properdocs.yml").read_text(encoding="utf-8").split("\nnav:")[1]
    names = [path.relative_to(ROOT / "docs").as_posix() for path in PAGES]
    names += [f"notebooks/{path.stem}.md" for path in NOTEBOOKS]
    assert [name for name in names if f" {name}\n" not in navigation] == []


def test_every_link_has_a_target(pages):
    """Links within the site, those to headings included. ProperDocs does not check raw HTML."""
    missing = []
    for path, page in pages.items():
        for link in page.links:
            address = urlsplit(link)
            if address.scheme or path.name == "404.html":
                continue
            target = (path.parent / unquote(address.path)).resolve() if address.path else path
            known = pages[target].ids if target in pages else set()
            if not target.exists() or (address.fragment and unquote(address.fragment) not in known):
                missing.append((path.name, link))
    assert missing == []


def test_nothing_is_fetched_from_elsewhere(site, pages):
    for path, page in pages.items():
        assert [link for link in page.fetched if urlsplit(link).netloc] == [], path
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"(?:@import|url\()\s*[\"']?https?:[^)]*", text) == [], style


def test_equations_are_drawn(site):
    for path in PAGES:
        name = path.relative_to(ROOT / "docs").with_suffix(".html")
        html = (site / name).read_text(encoding="utf-8")
        assert "arithmatex" not in html, f"{name}: an equation is still LaTeX"
        assert html.count("<math ") >= path.read_text(encoding="utf-8").count("$$") // 2
    assert re.search(r'<math [^>]*display="block"', (site / "method.html").read_text("utf-8"))
    style = (site / "stylesheets" / "site.css").read_text(encoding="utf-8")
    (font,) = re.findall(r'url\("(.*?)"\)', style)
    assert (site / "stylesheets" / font).is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_a_page_with_its_outputs(site, notebook):
    html = (site / "notebooks" / f"{notebook.stem}.html").read_text(encoding="utf-8")
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    data = [output.get("data", {}) for cell in cells for output in cell.get("outputs", [])]
    pictures = sum("image/png" in each for each in data)
    assert pictures == len(list((site / "notebooks").glob(f"{notebook.stem}_*.png")))
    assert html.count(f'src="{notebook.stem}_') == pictures
    tables = ["".join(each["text/html"]).strip() for each in data if "text/html" in each]
    assert [table for table in tables if table not in html] == []


def test_every_command_is_in_the_reference(site):
    html = (site / "commands.html").read_text(encoding="utf-8")
    group = typer.main.get_command(federate_app)
    for name in ("run", "export", "doctor", *(f"federate {each}" for each in group.commands)):
        assert f'id="fedmerge-{name.replace(" ", "-")}"' in html, name
    assert "<code>--trust-remote-code</code>" in html


def test_pages_are_of_sensible_size(pages):
    assert {path.name: path.stat().st_size for path in pages if path.stat().st_size > LARGEST} == {}


def test_every_public_name_is_in_the_reference():
    """Each name of ``fedmerge_peft.__all__`` has one place in docs/api."""
    text = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "docs/api").glob("*.md"))
    documented = re.findall(r"^::: fedmerge_peft\.(\w+)$", text, re.MULTILINE)
    assert sorted(documented) == sorted(fedmerge_peft.__all__)


def test_the_reference_shows_signatures_and_docstrings(site):
    html = (site / "api" / "running.html").read_text(encoding="utf-8")
    assert 'id="fedmerge_peft.federate"' in html
    assert "Run a recipe and its baselines." in html
    assert "The path is a file, or a directory that is not empty. Nothing was changed." in html
