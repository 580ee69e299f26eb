"""Rows list where the time of a side goes, and compare rounds on one rank and on two."""

import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from fedmerge_peft import Recipe

SPEED = Path(__file__).parents[2] / "benchmarks" / "speed"
TINY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 400,
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SPEED)
    return importlib.import_module


def test_nested_time_counts_for_the_innermost_part(benchmark, monkeypatch):
    shares = benchmark("shares")
    clock = [10.0]
    monkeypatch.setattr(shares.time, "monotonic", lambda: clock[0])

    class Model:
        def load(self):
            clock[0] += 3

    found = shares.Shares(8.0, "imports")
    found.watch("model", Model, "load")
    clock[0] += 1
    with found.part("training"):
        clock[0] += 5
        Model().load()
        clock[0] += 7
    clock[0] += 2
    assert found.end() == {"imports": 5.0, "training": 12.0, "model": 3.0, "other": 0.0}


def test_a_program_reports_its_parts_and_its_end_is_added(benchmark, tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, time\n"
        "import shares\n"
        "found = shares.Shares(float(sys.argv[1]), 'imports')\n"
        "with found.part('sleep'):\n"
        "    time.sleep(0.2)\n"
        "print('noise')\n"
        "shares.report(found)\n"
    )
    command = [sys.executable, str(script)]
    parts = benchmark("shares").run(command, env={"PYTHONPATH": str(SPEED)})
    assert 0.2 <= parts["sleep"] < 60
    assert parts["imports"] > 0
    assert parts["other"] > 0


def test_parts_are_medians_with_their_shares(benchmark):
    runs = [{"a": 1.0, "b": 3.0}, {"a": 2.0, "b": 2.0}, {"a": 4.0, "b": 6.0}]
    row = benchmark("shares").row("what", runs)
    assert math.isnan(row.ratio)
    assert str(row) == "| what | – | – | a 2.00 s (40 %), b 3.00 s (60 %) |  |"


def test_operations_are_grouped(benchmark):
    one = torch.randn(300, 300)
    found = benchmark("shares").by_operation(lambda: (one @ one, one.clone(), one.norm()))
    assert max(found, key=found.get) == "matrix products"
    assert found["copies"] > 0
    assert found["norms"] > 0


def test_the_parts_of_loading_and_training_are_found(benchmark, monkeypatch):
    """The functions that are watched exist and are called."""
    from fedmerge_peft import Federation
    from fedmerge_peft.engines import local, scoring
    from fedmerge_peft.training import batching
    from fedmerge_peft.training.prefix_cache import PrefixCache

    shares, setting = benchmark("shares"), benchmark("setting")
    for owner, names in (
        (local, ("model_folder", "load_backbone", "try_inputs", "cut_to_first_token")),
        (local, ("labeled_head", "make_task", "train")),
        (scoring, ("evaluate_parts",)),
        (batching, ("_disagreement",)),
        (PrefixCache, ("_try_model", "prepare")),
    ):
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # restored after the test
    for task in shares._with_subclasses(benchmark("fedmerge_peft.tasks.base").Task):
        if "encode" in vars(task):
            monkeypatch.setattr(task, "encode", task.encode)
    found = shares.Shares(shares.time.monotonic(), "imports")
    shares.watch_engine(found)
    engine = setting.engine(2, 4, "lora.layers_to_transform=[1]", model="tiny:bert", tests=2)
    next(Federation(engine.recipe, engine).rounds())
    parts = ("model", "tokens", "trials", "frozen layers", "training", "evaluation")
    assert all(found.end()[part] > 0 for part in parts), found.seconds


@pytest.mark.slow
def test_a_second_run_is_compared_with_the_first(benchmark):
    rows = list(benchmark("again").rows(TINY, repeats=1))
    assert [row.wanted for row in rows] == ["≤ 0.4", "", ""]
    assert rows[0].ratio > 0
    assert all("frozen layers" in row.sides and "imports" in row.sides for row in rows[1:])


@pytest.mark.slow
def test_the_parts_of_the_first_step_are_listed(benchmark):
    rows = list(benchmark("startup").first_step(repeats=1))
    assert [row.wanted for row in rows] == ["≥ 0.91", "", ""]
    for row in rows[1:]:
        assert all(part in row.sides for part in ("imports", "model", "tokens", "training"))


def test_the_made_table_fits_the_recipe(benchmark, tmp_path):
    from fedmerge_peft.data import federate_data

    data = benchmark("ranks").made_table(tmp_path / "made.parquet")
    recipe = Recipe.load("text_tasks", [f"data.path={data}"])
    found = federate_data(recipe.data, recipe.task.label_column, recipe.seed, None)
    assert len(found.clients) == 24
    assert {client.size for client in found.clients} == {48}
    assert {len(client.test) for client in found.clients} == {50}


def test_seconds_are_read_from_the_records_of_a_run(benchmark, write_run):
    run = write_run("a", [], [[0.1], [0.2], [0.3]])
    assert benchmark("ranks").seconds_of_rounds(run) == [2.0, 2.0]


def test_runs_alternate_and_rounds_are_compared(benchmark, monkeypatch, tmp_path):
    ranks = benchmark("ranks")
    monkeypatch.setattr(ranks, "table", lambda _: tmp_path)
    calls = []

    def round_of(data, out, workers, threads, overrides):
        calls.append((workers, threads))
        return {("2", None): 1.0, ("1", None): 1.5, ("1", "1"): 1.75}[workers, threads]

    monkeypatch.setattr(ranks, "_round", round_of)
    rows = [(row.ratio, row.wanted) for row in ranks.rows(repeats=2)]
    assert rows == [(1.5, "≥ 1.6"), (1.75, "")]
    assert calls == [*ranks.SIDES.values(), *reversed(ranks.SIDES.values())]


@pytest.mark.slow
def test_a_round_on_two_ranks_is_measured(benchmark, monkeypatch, tmp_path):
    ranks = benchmark("ranks")
    monkeypatch.setattr(ranks, "ROUNDS", 2)
    monkeypatch.setattr(ranks, "EACH", {"train": 24, "test": 8})
    data = ranks.made_table(tmp_path / "made.parquet")
    tiny = ["backbone.model=tiny:bert", "lora.layers_to_transform=[1]", "data.max_train=6"]
    tiny += ["data.max_test=2", "training.device=cpu"]
    assert 0 < ranks._round(data, tmp_path / "run", "2", None, tiny) < 600
    (environment,) = (tmp_path / "run").rglob("environment.json")
    assert json.loads(environment.read_text())
