"""Benchmark pages name the runs behind their numbers and are not overwritten by partial runs."""

import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

from fedmerge_peft import Run
from fedmerge_peft.runs.directory import FORMAT

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
    (folder / "environment.json").write_text(json.dumps({"format": FORMAT, **environment}))
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
        sys, "argv", ["benchmarks/quality/quality.py", "text_tasks", "--seeds", "1, 2"]
    )
    assert program("provenance").stamp(runs) == (
        "`python benchmarks/quality/quality.py text_tasks --seeds '1, 2'`, newest run of "
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


@pytest.fixture
def quality(program, write_run, tmp_path, monkeypatch, capsys):
    """``quality("--write")``: run the program on a setting whose runs have all finished.

    Return its output and the files that it wrote.
    """
    module = program("quality")
    results = tmp_path / "results"
    results.mkdir()
    setting = {
        "recipe": "smoke",
        "data": "tickets.csv",
        "overrides": [RUN[0], "rounds=1"],
        "tuning_seed": 9,
    }
    (tmp_path / "mine.yaml").write_text(
        json.dumps({**setting, "methods": {"local": [[]], "fedavg": [[]]}})
    )
    monkeypatch.setattr(module, "HERE", tmp_path)
    monkeypatch.setattr(module, "RESULTS", results)
    for method in ("local", "fedavg"):
        for seed in (0, 1):
            write_run(
                f"runs/mine/final/{method}-seed{seed}",
                [*RUN, f"strategy={method}", f"seed={seed}"],
                [[0.0], [0.5]],
            )
            folder = write_run(
                f"runs/mine/tuning/{method}-{seed}",
                [*RUN, f"strategy={method}", "seed=9"],
                [[0.0], [0.5]],
            )
            summary = json.loads((folder / "summary.json").read_text())
            summary["final"]["served"]["clients"]["client 0"]["validation_accuracy"] = 0.5
            (folder / "summary.json").write_text(json.dumps(summary))

    def run(*arguments):
        command = [
            "quality.py",
            "mine",
            "--data",
            "data",
            "--runs",
            str(tmp_path / "runs"),
            "--seeds",
            "0,1",
            *arguments,
        ]
        monkeypatch.setattr(sys, "argv", command)
        module.main()
        return capsys.readouterr().out, {path.name: path.read_bytes() for path in results.iterdir()}

    return run


def test_a_page_a_table_and_a_figure_are_written(quality):
    out, written = quality("--write")
    assert "| fedavg | 2 | 0.500" in out
    assert "unknown commit" in out
    assert sorted(written) == ["mine.csv", "mine.md", "mine.svg"]


def test_some_methods_never_replace_a_table_of_more(quality):
    assert quality("--methods", "fedavg")[1] == {}
    before = quality("--write")[1]
    with pytest.raises(SystemExit, match=r"^[^\n]*--write[^\n]*$"):
        quality("--methods", "fedavg", "--write")
    assert quality("--methods", "fedavg")[1] == before


def test_an_unknown_method_is_one_message(quality):
    with pytest.raises(SystemExit, match=r"^mine\.yaml has no nosuch; it has local, fedavg$"):
        quality("--methods", "nosuch,fedavg")


def test_the_two_programs_write_different_files(program, write_run, tmp_path, monkeypatch, capsys):
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
