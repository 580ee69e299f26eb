"""Every promise of the threat model names a test that exists."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "threat_model.md").read_text()
SECTION = PAGE.partition("### Promises and their tests")[2]
ROWS = re.findall(r"^\| ([A-Z].*?) \| `(tests/\S+?)::(\w+)` \|$", SECTION, re.MULTILINE)


def test_the_table_has_rows_of_this_form_only():
    assert len(ROWS) == SECTION.partition("\n## ")[0].count("\n| ") - 1 > 5


@pytest.mark.parametrize(("promise", "path", "name"), ROWS, ids=[name for *_, name in ROWS])
def test_a_promise_has_a_test(promise, path, name):
    tree = ast.parse((ROOT / path).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, promise
