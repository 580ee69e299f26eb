"""The commands that ``fedmerge run`` suggests at its end."""

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedmerge_peft import Recipe
from fedmerge_peft.cli.run import _next_commands


def suggested(adapters, overrides):
    recipe = Recipe.load("smoke", overrides)
    run = SimpleNamespace(path=Path("runs/smoke"), soup=range(adapters), recipe=recipe)
    return {purpose: command for command, purpose in _next_commands(run, "smoke", overrides)}


def test_an_override_is_replaced_and_not_repeated():
    command = suggested(5, ["strategy.adapters=5", "rounds=1"])["a smaller soup"]
    assert shlex.split(command)[2:-2] == ["smoke", "rounds=1", "strategy.adapters=3"]
    merged = suggested(1, ["strategy=fedavg", "rounds=1"])["merged adapters instead"]
    assert shlex.split(merged)[2:-2] == ["smoke", "rounds=1", "strategy=fedmerge"]


@pytest.mark.parametrize(("adapters", "fewer"), [(2, 1), (3, 2), (12, 6)])
def test_a_smaller_soup_is_smaller(adapters, fewer):
    assert f"strategy.adapters={fewer} " in suggested(adapters, [])["a smaller soup"]


def test_one_adapter_has_no_smaller_soup():
    assert "a smaller soup" not in suggested(1, [])


@pytest.mark.parametrize(("adapters", "rounds"), [(1, 2), (4, 3)])
def test_a_run_of_warm_rounds_only_is_continued_beyond_them(adapters, rounds):
    found = suggested(adapters, ["strategy={name: fedmerge, start: warm}", f"rounds={rounds}"])
    command = found["clients are grouped after the warm rounds"]
    assert command == "fedmerge resume runs/smoke rounds=6"
    assert "clients are grouped after the warm rounds" not in suggested(1, ["rounds=2"])
