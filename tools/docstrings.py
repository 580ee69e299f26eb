"""Count the docstrings that open with a question word; fail if they are more than 2 %."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

LIMIT = 0.02
QUESTION = re.compile(r"(What|How|Where|Who|Which|Why|Whether)\b")
"""A clause that opens with one of these stands in for a noun or a verb."""


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """Line and text of each docstring of a file, those that follow an attribute included."""
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


def main(folder: str) -> int:
    """Print the offenders and the share; the exit status."""
    every = [
        (path, *found) for path in sorted(Path(folder).rglob("*.py")) for found in docstrings(path)
    ]
    questions = [entry for entry in every if QUESTION.match(entry[2])]
    for path, line, text in questions if len(questions) > LIMIT * len(every) else []:
        print(f"{path}:{line}: {text.splitlines()[0]}")
    print(
        f"{len(questions)} of {len(every)} docstrings open with a question word "
        f"({len(questions) / len(every):.1%}; at most {LIMIT:.0%})"
    )
    return int(len(questions) > LIMIT * len(every))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:] or ["src"]))
