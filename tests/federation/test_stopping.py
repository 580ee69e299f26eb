"""Runs that end before their last round: early stopping, and callbacks that stop."""

import math

import pytest

from federation.small_recipe import recipe
from fedmerge_peft import Callback, Recipe, RecipeError, ResumeError, federate, resume
from fedmerge_peft.federation.early_stopping import EarlyStopping
from fedmerge_peft.recipe.stopping import StopRecipe


@pytest.mark.parametrize(
    ("metric", "values", "stops"),
    [
        ("loss", [3, 2, 1, 0], False),
        ("loss", [3, 2, 2, 2], True),
        ("loss", [1, 2, 3], True),
        ("loss", [1, 2, 0.5, 0.6], False),
        ("loss", [1, math.nan, math.nan], True),
        ("accuracy", [0.1, 0.2, 0.3], False),
        ("accuracy", [0.3, 0.2, 0.3], True),
        ("perplexity", [3, 4, 5], True),
    ],
)
def test_a_run_stops_after_rounds_without_improvement(metric, values, stops):
    stopping = EarlyStopping(StopRecipe(patience=2, metric=metric))
    for value in values:
        scores = {
            "a": {f"validation_{metric}": value + 1},
            "b": {f"validation_{metric}": value - 1},
        }
        stopping.observe(scores)
        stopping.observe(None)  # a round without evaluation
    assert (stopping.reason is not None) == stops


# Adapters at rest: no round improves the loss, and the run stops after rounds 1 + patience.
RESTING = ["strategy=fedavg", "strategy.server_lr=1e-30", "rounds=9", "stop.patience=2"]


def test_a_run_at_rest_stops_and_has_ended(engine, tmp_path):
    run = federate(recipe(*RESTING), tmp_path / "run", engine=engine)
    assert [record["round"] for record in run.records] == [1, 2, 3]
    assert run.ended
    assert run.summary["stopped"] == {
        "reason": "the validation loss has not improved in 2 evaluated rounds",
        "planned": 9,
    }
    assert run.summary["last"]["after_round"] == 3
    with pytest.raises(
        ResumeError, match=r"after 3 of 9 rounds.*stop.patience=null, and rounds=N for more than 9"
    ):
        resume(run.path, engine=engine)
    longer = resume(run.path, ["rounds=4", "stop.patience=null"], engine=engine)
    assert len(longer.records) == 4
    assert longer.summary["stopped"] is None


def test_a_run_that_stopped_goes_on_to_the_planned_rounds_with_another_condition(engine, tmp_path):
    resting = [*RESTING, "rounds=6", "baselines=[local]"]
    run = federate(recipe(*resting), tmp_path / "run", engine=engine)
    assert len(run.records) == 3
    local = len(run.baselines["local"].records)
    patient = resume(run.path, ["stop.patience=4"], engine=engine)
    assert (len(patient.records), patient.summary["stopped"]["planned"]) == (5, 6)
    whole = resume(run.path, ["stop.patience=null"], engine=engine)
    assert len(whole.records) == len(whole.baselines["local"].records) == 6 >= local
    assert whole.summary["stopped"] is None
    with pytest.raises(ResumeError, match=r"all of its 6 rounds are done.*rounds=N$"):
        resume(run.path, engine=engine)


@pytest.mark.equality
def test_an_interrupted_run_stops_where_the_whole_one_does(engine, tmp_path, left_behind):
    def interrupt(record):
        if record.round == 2:
            raise KeyboardInterrupt

    whole = federate(recipe(*RESTING), tmp_path / "whole", engine=engine)
    callbacks = [Callback(on_round=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        federate(recipe(*RESTING), tmp_path / "run", engine=engine, callbacks=callbacks)
    resume(tmp_path / "run", engine=engine)
    assert left_behind(tmp_path / "run") == left_behind(whole.path)


def test_a_callback_stops_one_run_but_not_the_baselines(engine, tmp_path):
    class Stop(Callback):
        def on_start(self, federation, run):
            self.strategy = federation.recipe.strategy.name

        def on_client(self, reply):
            if self.strategy == "fedmerge":
                self.stop()

    run = federate(
        recipe("rounds=2", "baselines=[local]"),
        tmp_path / "run",
        engine=engine,
        callbacks=[Callback(), Stop()],
    )
    assert run.ended
    assert len(run.records) == 1
    assert run.summary["stopped"] == {"reason": "a callback has stopped the run", "planned": 2}
    assert len(run.baselines["local"].records) == 2
    assert run.baselines["local"].summary["stopped"] is None


def test_functions_stop_a_run_through_their_callback(engine, tmp_path):
    callback = Callback(on_round=lambda record: callback.stop())
    run = federate(recipe("rounds=2"), tmp_path / "run", engine=engine, callbacks=[callback])
    assert len(run.records) == 1


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        (["stop.metric=perplexity"], "stop: metric: perplexity is not evaluated; use one of loss"),
        (["stop.patience=0"], "stop.patience: found 0"),
        (["stop.patience=2", "clients.fraction=0.5"], "clients.fraction is 0.5"),
        (["stop.patience=2", "privacy={mode: local, noise: 1.0}"], "scores without noise"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(overrides, fault):
    with pytest.raises(RecipeError, match=fault):
        Recipe.load("smoke", overrides)


def test_validation_examples_are_needed(tmp_path):
    without = recipe("stop.patience=2", "data.validation_fraction=0")
    with pytest.raises(RecipeError, match="but no client has any"):
        federate(without, tmp_path / "run")
