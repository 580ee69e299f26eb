"""Runs that take days are recognized by their number of optimizer steps before they start."""

import logging

import pytest

from federation.small_recipe import recipe
from fedmerge_peft import Recipe, RecipeError
from fedmerge_peft.federation.work import check_work
from fedmerge_peft.training.hyperparameters import Hyperparameters

NOTHING = Hyperparameters()


def steps(*overrides):
    """Return a recipe of one step per round for each client with 8 examples."""
    return Recipe.load("smoke", ["training.epochs=1", "training.batch_size=8", *overrides])


def test_usual_runs_are_not_warned_about(caplog):
    check_work(steps("rounds=1000"), [8] * 1_000, NOTHING)
    check_work(steps(), [], NOTHING)
    assert not caplog.records


@pytest.mark.parametrize(
    ("overrides", "sizes", "total", "each"),
    [
        (["rounds=1000000"], [8] * 20, "20,000,000", "per round: 20 × steps per client: 1)"),
        (["rounds=1000", "training.epochs=30000"], [8], "30,000,000", "per client: 30,000)"),
        (["rounds=100", "training.steps=200000"], [8, 9], "40,000,000", "per client: 200,000)"),
        (["rounds=1000000", "clients.fraction=0.5"], [80] * 4, "20,000,000", "per round: 2 × "),
        (
            ["rounds=100000", "strategy={name: fedavg_ft, fedavg_rounds: 1, passes: 1000}"],
            [8],
            "100,000,000",
            "round: 1 × steps per client: 1,000",
        ),
    ],
    ids=["rounds", "epochs", "steps", "fraction", "passes"],
)  # fmt: skip
def test_long_runs_are_warned_about_with_their_steps(overrides, sizes, total, each, caplog):
    with caplog.at_level(logging.WARNING):
        check_work(steps(*overrides), sizes, NOTHING)
    (message,) = caplog.messages
    assert f"about {total} optimizer steps (" in message
    assert each in message


def test_chosen_epochs_count(caplog):
    recipe = steps("rounds=1000000", "training.epochs=auto")
    check_work(recipe, [8] * 10, Hyperparameters(epochs=1))
    assert not caplog.records
    check_work(recipe, [8] * 10, Hyperparameters(epochs=4))
    assert "about 40,000,000 optimizer steps" in caplog.text


def test_runs_of_years_are_refused_before_the_first_step(tmp_path, smoke_engine):
    from fedmerge_peft import federate

    years = recipe("rounds=1000000", "training.steps=1000000", "training.learning_rate=auto")
    with pytest.raises(RecipeError, match=r"rounds: .*about 6,000,000,000,000 optimizer steps"):
        federate(years, tmp_path / "run")
