"""``evaluation.serve``: the round whose adapters and scores are the result of a run."""

import pytest
import torch

from fedmerge_peft import RecipeError, federate, resume
from fedmerge_peft.analysis import local_global_gap

DIVERGING = ["strategy=fedavg", "training.optimizer=sgd", "training.learning_rate=3"]


@pytest.fixture(scope="module")
def runs(smoke, smoke_engine, tmp_path_factory):
    """A run whose validation loss rises after the first round, served with last and with best."""
    folder = tmp_path_factory.mktemp("runs")
    recipes = {
        serve: smoke(*DIVERGING, "rounds=3", f"evaluation.serve={serve}")
        for serve in ("last", "best")
    }
    return {
        serve: federate(recipe, folder / serve, engine=smoke_engine.with_recipe(recipe))
        for serve, recipe in recipes.items()
    }


def test_the_best_round_is_served_and_reported(runs):
    last, best = runs["last"], runs["best"]
    losses = [record["served"]["validation_loss"] for record in best.records]
    losses.append(last.summary["final"]["served"]["validation_loss"])
    chosen = losses.index(min(losses))
    assert chosen < 3 == last.round()
    assert best.round() == best.round(best=True) == last.round(best=True) == chosen
    assert torch.equal(best.soup.rows, last.state(best=True)[0].rows)
    assert not torch.equal(best.soup.rows, last.soup.rows)
    assert best.scores() == last.scores(best=True)
    assert best.summary["final"]["served"]["validation_loss"] == min(losses)
    client = best.client_names[0]
    served, other = best.adapter(client), last.adapter(client, best=True)
    assert all(torch.equal(served[key], other[key]) for key in other)


def test_curves_and_gaps_are_those_of_the_rounds(runs):
    last, best = runs["last"], runs["best"]
    assert best.last_scores == last.last_scores == last.summary["final"]["served"]
    columns = ["distance", "loss"]
    assert local_global_gap(best)[columns].equals(local_global_gap(last)[columns])


def test_a_resumed_run_continues_from_its_last_round(runs, smoke, smoke_engine, tmp_path):
    recipe = smoke(*DIVERGING, "rounds=2", "evaluation.serve=best")
    engine = smoke_engine.with_recipe(recipe)
    path = federate(recipe, tmp_path / "run", engine=engine).path
    run = resume(path, ["rounds=3"], engine=engine)
    assert run.records[2]["train_loss"] == runs["best"].records[2]["train_loss"]
    assert torch.equal(run.soup.rows, runs["best"].soup.rows)


def test_the_preset_paper_runs(smoke, tmp_path):
    own = ["training={device: cpu}", "rounds=2", "strategy={name: fedmerge, preset: paper}"]
    recipe = smoke(*own)
    assert (recipe.training.optimizer, recipe.training.proximal) == ("sgd", 0.01)
    run = federate(recipe, tmp_path / "run")
    assert run.soup.rows.shape[0] == 5
    assert run.training == recipe.training  # nothing is left to choose
    assert run.round() == run.round(best=True)


def test_the_best_round_needs_validation_examples(smoke, tmp_path):
    recipe = smoke("evaluation.serve=best", "data.validation_fraction=0")
    with pytest.raises(RecipeError, match=r"evaluation.serve: best needs validation examples"):
        federate(recipe, tmp_path / "run")
