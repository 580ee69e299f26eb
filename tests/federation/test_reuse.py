"""Baselines of an earlier run are taken over, and refused if anything that decides them differs."""

import shutil

import pytest

from fedmerge_peft import RecipeError, federate, resume
from fedmerge_peft.util import checked


@pytest.fixture(scope="module")
def earlier(smoke, smoke_engine, tmp_path_factory):
    smoke_engine.recipe = smoke("baselines=[fedavg, local]")
    path = tmp_path_factory.mktemp("earlier") / "run"
    return federate(smoke("rounds=2", "baselines=[fedavg, local]"), path, engine=smoke_engine)


def again(smoke, earlier, *overrides):
    return smoke(
        "rounds=2", "baselines=[fedavg, local]", f"baselines_from={earlier.path}", *overrides
    )


def test_baselines_are_taken_over_and_only_the_strategy_runs(
    smoke, smoke_engine, earlier, tmp_path, monkeypatch
):
    recipe = again(smoke, earlier, "strategy.adapters=3", "name=other")
    from fedmerge_peft.federation import federate as running

    begun = []
    federation = running.Federation
    monkeypatch.setattr(
        running,
        "Federation",
        lambda one, *rest: begun.append(one.strategy.name) or federation(one, *rest),
    )
    run = federate(recipe, tmp_path / "run", engine=smoke_engine)
    assert begun == ["fedmerge"]
    for name, baseline in earlier.baselines.items():
        taken = run.baselines[name]
        assert taken.summary == baseline.summary
        assert taken.records == baseline.records
    assert run.ended


def test_a_run_with_reused_baselines_can_be_extended(smoke, smoke_engine, earlier, tmp_path):
    run = federate(again(smoke, earlier), tmp_path / "run", engine=smoke_engine)
    before = {name: each.summary for name, each in earlier.baselines.items()}
    longer = resume(run.path, ["rounds=3"], engine=smoke_engine)
    assert [len(each.records) for each in longer.baselines.values()] == [3, 3]
    assert {name: each.summary for name, each in earlier.baselines.items()} == before
    assert [len(each.records) for each in earlier.baselines.values()] == [2, 2]


def test_missing_baselines_run(smoke, smoke_engine, earlier, tmp_path):
    recipe = again(smoke, earlier, "baselines=[local, ditto]")
    run = federate(recipe, tmp_path / "run", engine=smoke_engine)
    assert set(run.baselines) == {"local", "ditto"}
    assert run.baselines["local"].records == earlier.baselines["local"].records


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rounds=3", "rounds was 2, is 3"),
        ("seed=1", "seed was 0, is 1"),
        ("training.learning_rate=0.5", "training.learning_rate was"),
        ("data.max_train=7", "data.max_train was 8, is 7"),
        ("lora.r=3", "lora.r was"),
        ("baselines_from=nowhere", "nowhere holds no run"),
        ("baselines=[ditto]", "has no ditto; it has fedmerge, fedavg, local"),
        ("baselines=[]", "there are no baselines to reuse"),
        ("baselines=[{name: fedavg, server_lr: 0.5}]", "server_lr of the baseline fedavg was"),
    ],
)
def test_other_settings_are_refused_before_anything_is_written(
    smoke, smoke_engine, earlier, tmp_path, override, message
):
    with pytest.raises(RecipeError, match=message):
        federate(again(smoke, earlier, override), tmp_path / "run", engine=smoke_engine)
    assert not (tmp_path / "run").exists()


def test_a_run_without_baselines_is_a_baseline_later(smoke, smoke_engine, tmp_path):
    smoke_engine.recipe = smoke()
    alone = ["rounds=1", "strategy=fedavg", "baselines=[]"]
    earlier = federate(smoke(*alone), tmp_path / "earlier", engine=smoke_engine)
    recipe = smoke("rounds=1", "baselines=[fedavg]", f"baselines_from={earlier.path}")
    run = federate(recipe, tmp_path / "run", engine=smoke_engine)
    assert run.baselines["fedavg"].records == earlier.records


def test_other_examples_are_refused(smoke, smoke_engine, earlier, tmp_path):
    changed = type(earlier)(shutil.copytree(earlier.path, tmp_path / "earlier"))
    for path in changed.path.rglob("examples.json"):
        checked.write_document(path, {"digest": "of other texts"})
    with pytest.raises(RecipeError, match=r"examples\.json differs"):
        federate(again(smoke, changed), tmp_path / "run", engine=smoke_engine)


def test_an_unfinished_baseline_is_refused(smoke, smoke_engine, earlier, tmp_path):
    changed = type(earlier)(shutil.copytree(earlier.path, tmp_path / "earlier"))
    (changed.baselines["local"].path / "summary.json").unlink()
    with pytest.raises(RecipeError, match=r"run of local in .* has not ended; first resume "):
        federate(again(smoke, changed), tmp_path / "run", engine=smoke_engine)


def test_the_digest_follows_from_the_examples(smoke, smoke_engine):
    from fedmerge_peft.engines.local import LocalEngine

    other = LocalEngine.from_recipe(smoke("data.max_test=5"))
    same = LocalEngine.from_recipe(smoke())
    assert smoke_engine.examples_digest == same.examples_digest != other.examples_digest
