"""What the README says to type works."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import get_args

import pytest

from fedmerge_peft.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
SMALL = ["backbone.model=tiny:bert", "lora.layers_to_transform=[1]", "rounds=1", "baselines=[]", "data.max_train=6", "training.device=cpu"]


def test_the_readme_shows_commands():
    assert len([command for command in COMMANDS if command[0] == "fedmerge"]) >= 6
    assert ["make", "quickstart"] in COMMANDS
    assert ["make", "test"] in COMMANDS


@pytest.mark.parametrize("command", [c for c in COMMANDS if c[0] == "make"], ids=shlex.join)
def test_make_knows_the_target(command):
    assert subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, check=False).returncode == 0


def test_fedmerge_commands_run_in_the_order_they_are_shown(tmp_path, monkeypatch, capsys):
    """On a tiny model where something trains, else as they stand."""
    monkeypatch.chdir(tmp_path)
    tickets = (ROOT / "src" / "fedmerge_peft" / "data" / "embedded" / "support_tickets.csv").read_text(encoding="utf-8").splitlines(True)
    (tmp_path / "newcomer.csv").write_text("".join(tickets[:30]), encoding="utf-8")
    for command in COMMANDS:
        if command[0] != "fedmerge":
            continue
        arguments = [*command[1:], *(SMALL if command[1] in ("run", "sweep") else [])]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code in (0, None), (command, capsys.readouterr().err)
    assert (tmp_path / "runs" / "three" / "summary.json").exists()
    assert (tmp_path / "clients.png").exists()
    assert (tmp_path / "methods.png").exists()
    assert (tmp_path / "runs" / "three" / "personalized" / "newcomer" / "adapter_model.safetensors").exists()
    assert (tmp_path / "recipe.schema.json").exists()


def test_the_python_example_runs(tmp_path, monkeypatch):
    """With the tiny model in place of the real one."""
    monkeypatch.chdir(tmp_path)
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    exec(compile(example.replace('"quickstart"', '"smoke"'), "README.md", "exec"), {})
    assert (tmp_path / "fen-water" / "adapter_model.safetensors").exists()


def test_every_method_in_the_table_is_there_and_none_is_left_out():
    from fedmerge_peft.recipe.strategies import StrategyName

    table = README.split("| | methods |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == set(get_args(StrategyName))


def test_every_recipe_in_the_table_is_shipped():
    from fedmerge_peft.recipe.loading import shipped

    table = README.split("| recipe |")[1].split("\n\n")[0]
    assert set(re.findall(r"`(\w+)`", table)) == {recipe.name for recipe in shipped()}
