"""Scores from a function that Python passes."""

import numpy as np
import pytest

from federation.small_recipe import recipe
from fedmerge_peft import FedMergeError, RecipeError, federate
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.tasks.metrics import own_scores
from fedmerge_peft.tasks.predictions import Predictions


def hits(predictions, references):
    return {"share": np.mean(np.array(predictions) == references), "examples": len(references)}


def test_a_function_adds_scores_and_changes_no_others(tmp_path):
    run = federate(recipe("rounds=1"), tmp_path / "run", metrics=hits)
    clients = run.clients
    assert (clients["test_share"] == clients["test_accuracy"]).all()
    assert (clients["test_examples"] == clients["test"]).all()
    scores = run.records[0]["served"]["clients"]
    assert all(each["validation_share"] == each["validation_accuracy"] for each in scores.values())
    assert run.records[0]["served"]["metric"] == "test_accuracy"


def test_an_engine_takes_metrics_before_the_run(tmp_path):
    engine = LocalEngine.from_recipe(recipe())
    with pytest.raises(RecipeError, match=r"engine\.add_metrics"):
        federate(recipe(), tmp_path / "run", engine=engine, metrics=hits)
    engine.add_metrics(lambda predictions, references: {"one": 1})
    run = federate(recipe("rounds=1"), tmp_path / "run", engine=engine)
    assert (run.clients["test_one"] == 1).all()
    engine.add_metrics(lambda predictions, references: 1 / 0)
    with pytest.raises(FedMergeError, match="ZeroDivisionError"):
        federate(recipe("rounds=1"), tmp_path / "other", engine=engine)


@pytest.mark.parametrize(
    ("result", "fault"),
    [
        (0.5, "the function returned 0.5, expected numbers by name"),
        ({"accuracy": 0.5}, "the name 'accuracy' is already taken"),
        ({"loss": 0.5}, "the name 'loss' is already taken"),
        ({3: 0.5}, "the function returned a value named 3, expected a text as its name"),
        ({"f": "high"}, "f is text 'high', expected a number"),
    ],
)
def test_other_results_are_refused(result, fault):
    predictions = Predictions(outputs={"classes": ([0], [1])})
    with pytest.raises(RecipeError, match=f"metrics: {fault}"):
        own_scores(lambda *_: result, ["accuracy"], predictions)


def test_generated_texts_take_the_place_of_ids():
    outputs = {"tokens": ([0, 1], [1, 1]), "texts": (["yes"], ["no"])}
    predictions = Predictions(outputs=outputs)
    seen = []
    own_scores(lambda *both: seen.append(both) or {}, [], predictions)
    assert seen == [(["yes"], ["no"])]
