"""Benchmark pages name the runs behind their numbers."""

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from fedmerge_peft import Run
from fedmerge_peft.runs.formats import FORMAT
from fedmerge_peft.util import checked

QUALITY = Path(__file__).parents[2] / "benchmarks" / "quality"
RUN = ["evaluation.finetuned=false", "data.path=data/tickets.csv", "baselines=[]"]


@pytest.fixture
def program(monkeypatch):
    """``program("quality")``: the module, as the interpreter would load it from its folder."""
    monkeypatch.syspath_prepend(str(QUALITY))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", QUALITY / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


def say(folder, **environment):
    checked.write_document(folder / "environment.json", {"format": FORMAT, **environment})
    return Run.open(folder)


def test_the_stamp_follows_from_the_runs(program, write_run, monkeypatch):
    machine = {
        "device": "cpu",
        "threads": 1,
        "processor": "Some CPU",
        "packages": {"torch": "2.9", "fedmerge-peft": "0.1.0"},
    }
    runs = [
        say(
            write_run("a", [], [[0.0], [0.5]]),
            commit="a" * 40,
            dirty=False,
            started="2031-01-02T03:04:05Z",
            **machine,
        ),
        say(
            write_run("b", [], [[0.0], [0.5]]),
            commit="b" * 40,
            dirty=True,
            started="2031-02-03T03:04:05Z",
            **machine,
        ),
        say(
            write_run("c", [], [[0.0], [0.5]]),
            commit="a" * 40,
            dirty=False,
            started="2030-01-02T03:04:05Z",
            **machine,
        ),
    ]
    monkeypatch.setattr(
        sys, "argv", ["benchmarks/quality/over_seeds.py", "text_tasks", "--seeds", "1, 2"]
    )
    assert program("provenance").stamp(runs) == (
        "`python benchmarks/quality/over_seeds.py text_tasks --seeds '1, 2'`, newest run of "
        "2031-02-03, commit aaaaaaa, commit bbbbbbb (dirty), fedmerge-peft 0.1.0, torch 2.9, "
        "Some CPU with 1 thread."
    )


def test_runs_with_less_information_are_stamped(program, write_run):
    bare, older = write_run("bare", [], [[0.0], [0.5]]), write_run("older", [], [[0.0], [0.5]])
    for folder in (bare, older):
        os.utime(folder / "recipe.yaml", (0, 0))
    stamp_text = program("provenance").stamp(
        [Run.open(bare), say(older, device="cpu", threads=2, packages={"torch": "2.9"})]
    )
    assert "newest run of 1970-01-01, unknown commit, " in stamp_text
    assert stamp_text.endswith("torch 2.9, of unknown version, CPU with 2 threads, unknown device.")


def test_the_page_has_the_name_of_its_recipe(program, write_run, tmp_path, monkeypatch, capsys):
    module = program("over_seeds")
    write_run("out/smoke", ["seed=0"], [[0.0], [0.5]])
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    arguments = [
        "smoke",
        "rounds=1",
        "baselines=[]",
        "--seeds",
        "0",
        "--out",
        str(tmp_path / "out"),
        "--write",
    ]
    monkeypatch.setattr(sys, "argv", ["benchmarks/quality/over_seeds.py", *arguments])
    module.main()
    assert [path.name for path in tmp_path.glob("*.md")] == ["smoke_seeds.md"]
    assert re.search(
        r"`python benchmarks/quality/over_seeds\.py smoke rounds=1 .* --write`",
        capsys.readouterr().out,
    )


def test_further_tasks_are_run_with_each_method_and_seed(program):
    module = program("further_tasks")
    for name in module.RECIPES:
        found = module.recipes(name, Path("DATA"), "0,1", ["rounds=2"])
        assert sorted((each.strategy.name, each.seed) for each in found.values()) == [
            (strategy, seed) for strategy in ("fedavg", "fedmerge", "local") for seed in (0, 1)
        ]
        for each in found.values():
            assert Path(each.data.path).parent == Path("DATA")
            assert each.training.learning_rate == "auto"
            assert (each.rounds, each.baselines) == (2, [])
