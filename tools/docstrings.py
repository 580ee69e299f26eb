"""Check docstrings, pages and settings.

At most 2 % of the docstrings open with a question word. Prose of the pages, and lines of recipes,
templates and settings, have at most 100 columns. Ruff checks the lines of Python files.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

LIMIT = 0.02
QUESTION = re.compile(r"(What|How|Where|Who|Which|Why|Whether)\b")
"""A docstring that opens with one of these words lacks a noun or a verb at its start."""
Finder = Callable[[str], Iterator[tuple[int, str]]]
COLUMNS = 100
PAGES = ("*.md", "docs/**/*.md", "examples/**/*.md")
GENERATED = {Path("docs/recipes.md")}
"""Pages that a program writes."""
SETTINGS = (
    *("*.toml", "*.yml", ".*.yaml", "*.cff", "Makefile", ".ci/*", ".github/**/*.yml"),
    *("recipes/*.yaml", "benchmarks/*/*.yaml", "benchmarks/*/*.sh"),
    *("examples/*/*.yaml", "examples/*/*.toml"),
    *(f"{folder}/**/*.{ending}" for folder in ("src", "docs") for ending in ("css", "j2", "js")),
)
"""Handwritten files other than pages and Python files."""
_FENCE = re.compile(r"\s*(`{3,}|~{3,})")
_NOT_PROSE = re.compile(r"\s*(\||#|<|!\[|\[!\[)|\s*([-*] )?\[[^\]]*\]\([^)]*\)[.,;]?\s*$")
"""Tables, headings, HTML, images, and lines that are one link."""
_ONE_URL = re.compile(r"\W*([\w-]+:\s+)?\W*https?://\S+\s*$")
"""A line of settings that is one URL, perhaps with a key or in a comment."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line and text of each docstring of a file, including docstrings of attributes."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        owns_first = isinstance(
            node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        )
        for number, statement in enumerate(body):
            if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
                continue
            after = (
                isinstance(body[number - 1], (ast.Assign, ast.AnnAssign)) if number else owns_first
            )
            if after and isinstance(text := statement.value.value, str):
                yield statement.lineno, text.strip()


def long_lines(page: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line of prose with more than ``COLUMNS`` characters."""
    fence = ""
    for number, line in enumerate(page.splitlines(), 1):
        if mark := _FENCE.match(line):
            if not fence:
                fence = mark[1]
            elif mark[1].startswith(fence):
                fence = ""
        elif not fence and len(line) > COLUMNS and not _NOT_PROSE.match(line):
            yield number, line


def questions(root: Path) -> int:
    """Print the share of docstrings that open with a question word; return the exit status.

    If the share is too high, also print these docstrings.
    """
    every = [
        (path, *found)
        for path in sorted((root / "src").rglob("*.py"))
        for found in docstrings(path)
    ]
    found = [entry for entry in every if QUESTION.match(entry[2])]
    for path, line, text in found if len(found) > LIMIT * len(every) else []:
        print(f"{path}:{line}: {text.splitlines()[0]}")
    print(
        f"{len(found)} of {len(every)} docstrings open with a question word "
        f"({len(found) / max(1, len(every)):.1%}; at most {LIMIT:.0%})"
    )
    return int(len(found) > LIMIT * len(every))


def long_settings(text: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line longer than ``COLUMNS``, unless the line is one URL."""
    for number, line in enumerate(text.splitlines(), 1):
        if len(line) > COLUMNS and not _ONE_URL.match(line):
            yield number, line


def wide(root: Path, kind: str, patterns: Sequence[str], find: Finder) -> int:
    """Print the lines that are too long, and return the exit status.

    Args:
        root: Folder of the project.
        kind: Name of the files, for the last line of the output.
        patterns: Patterns of the files, relative to ``root``.
        find: Function that returns the number and the text of each long line of a file.
    """
    paths = sorted({path for pattern in patterns for path in root.glob(pattern) if path.is_file()})
    every = [
        f"{path}:{number}: {len(line)} columns, at most {COLUMNS}: {line[:60]}..."
        for path in paths
        if path.relative_to(root) not in GENERATED
        for number, line in find(path.read_text(encoding="utf-8"))
    ]
    print("\n".join([*every, f"{len(every)} lines of {len(paths)} {kind} are too long"]))
    return int(bool(every))


def main(root: str = ".") -> int:
    """Check the files below ``root``; return the exit status."""
    folder = Path(root)
    return (
        questions(folder)
        | wide(folder, "pages", PAGES, long_lines)
        | wide(folder, "files of settings", SETTINGS, long_settings)
    )


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
