"""``tools/docstrings.py`` finds docstrings and files that break the rules of CONTRIBUTING.md."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LONG = "word " * 21


@pytest.fixture(scope="module")
def style():
    spec = importlib.util.spec_from_file_location("docstrings", ROOT / "tools" / "docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path):
    """Write a project with one docstring and pages, and return its folder."""

    def write(docstring="Return it.", **pages):
        (tmp_path / "src").mkdir()
        (tmp_path / "src" / "a.py").write_text(f'"""{docstring}"""\n')
        (tmp_path / "docs" / "api").mkdir(parents=True)
        for name, text in pages.items():
            (tmp_path / f"{name.replace('__', '/')}.md").write_text(text)
        return str(tmp_path)

    return write


def test_this_repository_passes(style, capsys):
    assert style.main(str(ROOT)) == 0, capsys.readouterr().out


def test_a_question_word_at_the_start_of_a_docstring_is_reported(style, project, capsys):
    assert style.main(project("How it works.")) == 1
    assert "a.py:1: How it works." in capsys.readouterr().out


@pytest.mark.parametrize("name", ["README", "docs__a", "docs__api__b"])
def test_a_long_line_of_prose_is_reported_with_its_page(style, project, capsys, name):
    assert style.main(project(**{name: f"# Title\n\n{LONG}\n"})) == 1
    assert f"{name.replace('__', '/')}.md:3: 105 columns" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["```", "````"])
def test_a_long_line_after_a_block_of_code_is_reported(style, ending):
    page = f"{ending}\n{LONG}\n{ending}\n\n{LONG}\n"
    assert [number for number, _ in style.long_lines(page)] == [5]


@pytest.mark.parametrize(
    "line",
    [
        f"| {LONG} |",
        f"## {LONG}",
        f"![{LONG}](image.png)",
        f"[Link](https://example.org/{'a' * 100})",
        f"<p>{LONG}</p>",
        f"```text\n{LONG}\n```",
        f"````md\n```\n{LONG}\n````",
        "w" * 100,
    ],
)
def test_tables_code_headings_images_and_links_may_be_long(style, line):
    assert list(style.long_lines(line)) == []


@pytest.mark.parametrize(
    "name", ["Makefile", "CITATION.cff", "recipes/a.yaml", ".github/a/b.yml", "src/a/b.html.j2"]
)
def test_a_long_line_of_settings_is_reported_with_its_file(style, project, capsys, name):
    root = project()
    path = Path(root, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"a: b\n{LONG}\n")
    assert style.main(root) == 1
    assert f"{name}:2: 105 columns" in capsys.readouterr().out


@pytest.mark.parametrize("start", ["", "url: ", "  # ", "- url: "])
def test_only_a_line_that_is_one_url_may_be_long_in_settings(style, start):
    url = f"https://example.org/{'a' * 100}"
    assert list(style.long_settings(f"{start}{url}\n")) == []
    assert list(style.long_settings(f"{start}see {url} and more\n")) != []


def test_a_generated_page_may_be_long(style, project):
    assert style.main(project(docs__recipes=LONG)) == 0
