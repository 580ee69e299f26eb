"""Sweeps run every recipe once into a directory of its own, also after failures."""

import json
import os
from pathlib import Path

import pytest

from fedmerge_peft import (
    Callback,
    Recipe,
    RecipeError,
    RunBusyError,
    RunError,
    SweepError,
    expand,
    federate,
    sweep,
)
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.runs.cleanup import files_in, remove_run

TINY = [
    "rounds=2",
    "evaluation.finetuned=false",
    "data.max_train=6",
    "data.max_test=4",
    "training.device=cpu",
    "baselines=[]",
    "data.partition={scheme: iid, clients: 3}",
]


@pytest.fixture
def loads(monkeypatch):
    """The recipes for which engines were loaded."""
    seen = []
    load = LocalEngine.from_recipe.__func__

    def counted(cls, recipe, splits=None):
        seen.append(recipe)
        return load(cls, recipe, splits)

    monkeypatch.setattr(LocalEngine, "from_recipe", classmethod(counted))
    return seen


def events(into):
    return {
        "on_run": lambda name, _, fresh: into.append((name, fresh)),
        "on_failure": lambda name, error: into.append((name, error)),
    }


def scores(path):
    return json.loads((path / "summary.json").read_text())["final"]["served"]


def test_combinations_share_an_engine_if_possible(tmp_path, loads):
    recipes = expand("smoke", ["strategy=fedmerge,fedavg", "seed=0,1", *TINY])
    seen = []
    runs = sweep(recipes, tmp_path / "new" / "sweep", **events(seen))
    assert [recipe.seed for recipe in loads] == [0, 1]
    assert seen == [
        (f"strategy={name},seed={seed}", True) for seed in (0, 1) for name in ("fedmerge", "fedavg")
    ]
    assert list(runs) == list(recipes)
    alone = federate(recipes["strategy=fedavg,seed=0"], tmp_path / "alone")
    assert scores(alone.path) == scores(runs["strategy=fedavg,seed=0"].path)

    seen.clear()
    again = sweep(recipes, tmp_path / "new" / "sweep", **events(seen))
    assert seen == [(name, False) for name in recipes]
    assert [run.path for run in again.values()] == [run.path for run in runs.values()]
    assert len(loads) == 2 + 1


def test_an_engine_is_reused_for_other_training_settings_without_changing_results(tmp_path, loads):
    recipes = expand("smoke", ["training.learning_rate=1e-3,1e-2", "lora.r=2,4", *TINY])
    runs = sweep(recipes, tmp_path / "sweep")
    assert [recipe.lora.r for recipe in loads] == [2, 4]
    last = list(recipes)[-1]
    alone = federate(recipes[last], tmp_path / "alone")
    assert scores(alone.path) == scores(runs[last].path)
    assert len({str(scores(run.path)) for run in runs.values()}) == 4


def test_an_interrupted_sweep_resumes(tmp_path, left_behind):
    recipes = expand("smoke", ["strategy=local,fedavg,fedmerge", *TINY])
    rounds = []

    def interrupt(name, record):
        rounds.append((name, record.round))
        if rounds[-1] == ("strategy=fedavg", 1):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipes, tmp_path, on_round=interrupt)
    assert (tmp_path / "strategy=fedavg" / "metrics.jsonl").exists()
    seen, rounds = [], []
    runs = sweep(
        recipes,
        tmp_path,
        **events(seen),
        on_round=lambda name, record: rounds.append((name, record.round)),
    )
    assert seen == [
        ("strategy=local", False),
        ("strategy=fedavg", True),
        ("strategy=fedmerge", True),
    ]
    assert rounds == [("strategy=fedavg", 2), ("strategy=fedmerge", 1), ("strategy=fedmerge", 2)]
    whole = federate(recipes["strategy=fedavg"], tmp_path / "whole")
    assert left_behind(tmp_path / "strategy=fedavg") == left_behind(whole.path)
    assert [len(run.records) for run in runs.values()] == [2, 2, 2]


def test_a_run_without_one_of_its_baselines_is_unfinished(tmp_path):
    recipes = {"mine": Recipe.load("smoke", [*TINY, "rounds=1", "baselines=[fedavg, fedmerge]"])}
    sweep(recipes, tmp_path)
    (tmp_path / "mine" / "baselines" / "fedavg" / "summary.json").unlink()
    for fresh in (True, False):
        seen = []
        sweep(recipes, tmp_path, **events(seen))
        assert seen == [("mine", fresh)]


def test_a_failure_does_not_stop_the_others(tmp_path):
    recipes = expand("smoke", ["task.label=nosuch,queue", "strategy=fedavg,local", *TINY])
    seen = []
    with pytest.raises(SweepError) as failed:
        sweep(recipes, tmp_path, **events(seen))
    assert [name for name, how in seen if how is True] == [
        "task.label=queue,strategy=fedavg",
        "task.label=queue,strategy=local",
    ]
    assert list(failed.value.failures) == [
        "task.label=nosuch,strategy=fedavg",
        "task.label=nosuch,strategy=local",
    ]
    assert "2 runs of the sweep failed:" in str(failed.value)
    assert "nosuch" in failed.value.failures["task.label=nosuch,strategy=fedavg"]
    assert not any((tmp_path / "task.label=nosuch,strategy=fedavg").iterdir())


def test_a_run_of_another_recipe_is_refused_before_anything_starts(tmp_path, write_run, loads):
    taken = write_run("seed=1", ["seed=1", "lora.r=4"], [[0.0], [0.5]])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        RunError,
        match=(
            r"seed=1 contains the run of another recipe: rounds is 1 there and 3 here; "
            r"lora.r is 4 there and 2 here\."
        ),
    ):
        sweep(expand("smoke", ["seed=0,1", "rounds=3", "baselines=[]"]), tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    (taken / "summary.json").unlink()
    with pytest.raises(RunError, match="another recipe"):
        sweep(expand("smoke", ["seed=0,1", "rounds=3", "baselines=[]"]), tmp_path)
    assert loads == []


def test_recipes_that_differ_in_name_only_are_the_same(tmp_path, write_run, loads):
    write_run("mine", ["name=old"], [[0.0], [0.5]])
    assert list(
        sweep({"mine": Recipe.load("smoke", ["name=new", "rounds=1", "baselines=[]"])}, tmp_path)
    ) == ["mine"]
    assert loads == []


def test_a_default_written_out_is_the_same_recipe(tmp_path, write_run, loads):
    write_run(
        "old",
        ["strategy=fedavg", "strategy.server_lr=1.0", "strategy.server_momentum=0"],
        [[0.0], [0.5]],
    )
    assert list(
        sweep(
            {"old": Recipe.load("smoke", ["strategy=fedavg", "rounds=1", "baselines=[]"])}, tmp_path
        )
    ) == ["old"]
    adam = Recipe.load(
        "smoke", ["strategy=fedavg", "strategy.server_optimizer=adam", "rounds=1", "baselines=[]"]
    )
    with pytest.raises(
        RunError,
        match=(
            r"server_optimizer is sgd there and adam here; "
            r"strategy.server_lr is 1.0 there and 0.01 here"
        ),
    ):
        sweep({"old": adam}, tmp_path)
    assert loads == []


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("smoke/notes.txt", "smoke contains files that do not belong to a run; .* Move them,"),
        ("smoke", "smoke is a file, not a run directory; .* Move it,"),
    ],
)
def test_other_files_are_kept(tmp_path, where, message):
    path = tmp_path / where
    path.parent.mkdir(exist_ok=True)
    path.write_text("mine")
    with pytest.raises(RunError, match=message):
        sweep(expand("smoke", TINY), tmp_path)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    "where",
    [
        "thesis.txt",
        "weights/mine.safetensors",
        "personalized/clinic/adapter_config.json",
        "baselines/notes",
    ],
)
def test_other_files_in_an_unfinished_run_are_kept(tmp_path, write_run, loads, where):
    unfinished = write_run("smoke", [], [[0.0], [0.5]], finished=False)
    (unfinished / where).parent.mkdir(parents=True, exist_ok=True)
    (unfinished / where).write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    recipes = {"smoke": Recipe.load("smoke", ["rounds=1", "baselines=[]"])}
    with pytest.raises(
        RunError,
        match=f"contains an unfinished run and files that do not belong to a run: {where}\\.",
    ):
        sweep(recipes, tmp_path)
    with pytest.raises(RunError, match=where):
        remove_run(unfinished)
    assert sorted(tmp_path.rglob("*")) == before
    assert loads == []


def test_all_files_of_an_unfinished_run_are_cleared(tmp_path, smoke, smoke_engine):
    run = federate(
        smoke("rounds=2", "baselines=[fedavg]", "strategy.adapters=2"),
        tmp_path / "run",
        engine=smoke_engine,
    )
    (run.path / "weights" / ".round-00003.safetensors.4711").write_text(
        "killed while this was written"
    )
    (run.path / "baselines" / "fedavg" / ".recipe.yaml.4711").touch()
    assert len(files_in(run.path)) > 20
    remove_run(run.path)
    assert list(tmp_path.rglob("*")) == [run.path]


def test_the_recipe_is_cleared_last(tmp_path, write_run, monkeypatch):
    path = write_run("run", [], [[0.0], [0.5]])
    removed = []
    unlink = Path.unlink
    monkeypatch.setattr(Path, "unlink", lambda self, **_: (removed.append(self.name), unlink(self)))
    remove_run(path)
    assert removed[-1] == "recipe.yaml"
    assert len(removed) == 4


@pytest.mark.parametrize("name", ["a/b", "..", "", "/tmp"])
def test_names_outside_the_folder_are_refused(tmp_path, name):
    with pytest.raises(RecipeError, match="is not a valid folder name"):
        sweep({name: Recipe.load("smoke")}, tmp_path)


def test_a_folder_that_cannot_be_created_is_one_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        sweep(expand("smoke", TINY), tmp_path / "file" / "below")


# ---- beside other processes ----------------------------------------------------------------------
@pytest.fixture
def lock():
    """``lock(path)``: lock a directory as another process would; return the unlock function."""
    fcntl = pytest.importorskip("fcntl")

    def hold(path):
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return lambda: os.close(descriptor)

    return hold


@pytest.mark.parametrize("ends", [True, False])
def test_runs_of_other_processes_are_waited_for_last(
    tmp_path, write_run, lock, monkeypatch, ends, caplog
):
    recipes = expand("smoke", ["strategy=local,fedavg", "seed=0,1", *TINY])
    first = next(iter(recipes))
    there = write_run(f"elsewhere/{first}", [*TINY, "strategy=local"], [[0.0], [0.5], [0.7]])
    running = tmp_path / first
    there.rename(running)
    summary = (running / "summary.json").read_text()
    (running / "summary.json").unlink()
    let_go, seen = lock(running), []

    def sleep(seconds):
        assert (seconds > 0, len(seen), len(list(running.iterdir()))) == (True, 3, 3)
        if ends:
            (running / "summary.json").write_text(summary)
        let_go()

    monkeypatch.setattr("fedmerge_peft.federation.sweep.sleep", sleep)
    runs = sweep(recipes, tmp_path, **events(seen))
    assert list(runs) == list(recipes)
    # reused, or repeated if the other process left it unfinished
    assert seen[-1] == (first, not ends)
    assert (runs[first].summary["final"]["served"]["mean"] == 0.7) == ends
    assert f"waiting for other processes, which are running {first}" in caplog.messages


def test_a_single_run_is_not_mistaken_for_an_interrupted_one(tmp_path, lock):
    recipe = Recipe.load("smoke", [*TINY, "rounds=1", "baselines=[fedavg]"])
    tried = []

    def another_process(_):
        with pytest.raises(BlockingIOError):
            lock(tmp_path / "run")
        tried.append(1)

    federate(recipe, tmp_path / "run", callbacks=[Callback(on_round=another_process)])
    assert len(tried) == 2
    lock(tmp_path / "run")()


def test_a_directory_locked_by_another_process_is_not_written_to(tmp_path, lock):
    let_go = lock(tmp_path / "run")
    with pytest.raises(RunBusyError, match="run is being written by another process"):
        federate(Recipe.load("smoke", [*TINY, "rounds=1"]), tmp_path / "run")
    let_go()
    assert not any((tmp_path / "run").iterdir())
