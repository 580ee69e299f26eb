"""The commands of docs/using.md run."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from fedmerge_peft import Recipe, federate
from fedmerge_peft.cli import main

TEXT = (Path(__file__).parents[2] / "docs" / "using.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


@pytest.fixture
def first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["training.device=cpu", "baselines=[]", "rounds=1", "data.max_train=6"]
    return federate(Recipe.load("smoke", small), tmp_path / "runs" / "first")


def test_every_command_and_line_runs_in_order(first, tmp_path, capsys):
    for line in "".join(blocks("bash")).splitlines():
        with pytest.raises(SystemExit) as stopped:
            main(shlex.split(line)[1:])
        assert not stopped.value.code, (line, capsys.readouterr().err)
    names = {}
    for block in blocks("python"):
        exec(compile(block, "using.md", "exec"), names)
    made = (
        "first.html",
        "fen-water/README.md",
        "everyone/Fen Water/README.md",
        "runs/first/exported/soup",
        "between/adapter_config.json",
    )
    assert all((tmp_path / name).exists() for name in made)


def test_the_lines_of_recipes_are_valid():
    (lines,) = blocks("yaml")
    assert Recipe.load("smoke", [f"tracking={yaml.safe_load(lines)['tracking']}"]).tracking == [
        "tensorboard"
    ]
