"""Recipes made in Python are refused in the same words as those of files."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

from fedmerge_peft import Recipe, RecipeError, RunError, expand, federate, load_run, sweep
from fedmerge_peft.federation.callbacks import Callback, Callbacks
from fedmerge_peft.recipe.backbone import BackboneRecipe
from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.recipe.strategies import FedMergeRecipe

VALID = {
    "name": "x",
    "task": "sequence-classification",
    "backbone": {"model": "m"},
    "data": {"path": "p", "partition": {"scheme": "iid", "clients": 4}},
}


@pytest.mark.parametrize(
    ("values", "fault"),
    [
        ({"rounds": 0}, "Recipe: rounds: found 0, expected a whole number above 0"),
        ({"rounds": 10**30}, "Recipe: rounds: found 1000000000000000000000000000000, expected"),
        ({"seed": np.int64(3)}, "Recipe: seed: found np.int64(3), expected a whole number"),
        ({"lora": {"rank": 3}}, "Recipe: lora.rank: unknown key; did you mean 'r'?"),
        ({"lora": {1: 3}}, "Recipe: lora[1]: found the key 1, expected text"),
        ({"lora": 3}, "Recipe: lora: found 3, expected a section"),
        ({"lora": BackboneRecipe(model="m")}, "Recipe: lora: found BackboneRecipe("),
        ({"strategy": "fedmerg"}, "Recipe: strategy: found text 'fedmerg', expected one of"),
        ({"strategy": object()}, "Recipe: strategy: found <object object at"),
        ({"baselines": ["local", "local"]}, "Recipe: baselines: found more than once: local"),
        (
            {"baselines": [FedMergeRecipe(name="fedmerge"), {"name": "local", "x": 1}]},
            "Recipe: baselines[1].x: unknown key; use one of name",
        ),
        ({"data": {**VALID["data"], "path": Path("p")}}, "Recipe: data.path: found PosixPath('p')"),
        ({"task": {}}, "Recipe: task.name: this required key is missing; expected one of"),
    ],
)
@pytest.mark.parametrize("make", [lambda values: Recipe(**values), Recipe.model_validate])
def test_each_fault_has_the_words_of_a_recipe(make, values, fault):
    with pytest.raises(RecipeError) as caught:
        make({**VALID, **values})
    (found,) = caught.value.faults
    assert found.startswith(fault)


def test_dictionaries_keywords_and_dotted_keys_are_one_recipe():
    recipe = Recipe(**VALID, rounds=3, training={"epochs": 2, "batch_size": 4})
    assert Recipe(VALID, rounds=3, training={"epochs": 2, "batch_size": 4}) == recipe
    dotted = {**VALID, "rounds": 3, "training.epochs": 2, "training.batch_size": 4}
    assert Recipe(dotted) == Recipe(**dotted) == Recipe.model_validate(dotted) == recipe
    mixed = {**VALID, "rounds": 3, "training": {"epochs": 2}, "training.batch_size": 4}
    assert Recipe(mixed) == recipe
    assert mixed["training"] == {"epochs": 2}


def test_names_within_sections_keep_their_dots():
    recipe = Recipe(VALID, lora={"rank_pattern": {"layer.1": 2}}, **{"data.filter": {"a.b": ["c"]}})
    assert recipe.lora.rank_pattern == {"layer.1": 2}
    assert list(recipe.data.filter) == ["a.b"]


@pytest.mark.parametrize(
    ("values", "faults"),
    [
        ({"training.epoch": 2}, ["Recipe: training.epoch: unknown key; did you mean 'epochs'?"]),
        (
            {"training": {"epochs": 2}, "training.epochs": 3, "strategy": "local", "strategy.x": 1},
            [
                "Recipe: training.epochs: is given twice: 2 and 3",
                "Recipe: strategy.x: strategy is text 'local' here; write it as a dictionary with "
                "all its keys",
            ],
        ),
        ({"data.partition.clients": 0}, ["Recipe: data.partition.clients: is given twice: 4"]),
    ],
)
def test_faults_of_dotted_keys_have_the_words_of_a_recipe(values, faults):
    with pytest.raises(RecipeError) as caught:
        Recipe({**VALID, **values})
    assert len(caught.value.faults) == len(faults)
    for found, fault in zip(caught.value.faults, faults, strict=True):
        assert found.startswith(fault)


def test_what_is_no_dictionary_is_refused():
    with pytest.raises(RecipeError, match=r"text 'quickstart'.*Recipe\.load reads files"):
        Recipe("quickstart")
    with pytest.raises(RecipeError, match="Recipe: name: is given twice"):
        Recipe(VALID, name="y")


def test_all_faults_are_listed():
    with pytest.raises(RecipeError) as caught:
        Recipe(lora={"r": 0}, rounds=0)
    assert len(caught.value.faults) == 6
    with pytest.raises(RecipeError, match="Recipe: found a list, expected a section"):
        Recipe.model_validate([1])


def test_sections_alone_are_checked_too():
    with pytest.raises(RecipeError, match="LoraRecipe: r: found 0, expected a whole number above"):
        LoraRecipe(r=0)
    with pytest.raises(RecipeError, match="FedMergeRecipe: groups: 5 groups need 5 adapters"):
        FedMergeRecipe(name="fedmerge", groups=5, adapters=2)


def test_valid_sections_and_values_are_equal_and_can_be_copied():
    recipe = Recipe(**VALID, lora=LoraRecipe(r=4), strategy=FedMergeRecipe(name="fedmerge"))
    assert recipe == Recipe(**VALID, lora={"r": 4}, strategy="fedmerge")
    assert pickle.loads(pickle.dumps(recipe)) == copy.deepcopy(recipe) == recipe


@pytest.mark.parametrize(
    ("call", "fault"),
    [
        (lambda: federate("smoke"), "recipe: found text 'smoke', expected a Recipe; Recipe.load("),
        (lambda: federate(VALID), "recipe: found a section, expected a Recipe"),
        (lambda: sweep(Recipe(VALID), "out"), "recipes: found "),
        (lambda: sweep({"a": "smoke"}, "out"), "recipes['a']: found text 'smoke', expected"),
        (lambda: Recipe.load(VALID), "source: found a section, expected a path or the name"),
        (lambda: Recipe.load("smoke", "rounds=2"), "overrides: found text 'rounds=2', expected a"),
        (lambda: Recipe.load("smoke", {"rounds": 2}), "overrides: found a section, expected a"),
        (
            lambda: Recipe(VALID).replace([None]),
            "overrides: found a list, expected a list of texts",
        ),
        (lambda: expand("smoke", "rounds=2,3"), "overrides: found text 'rounds=2,3', expected"),
        (lambda: Recipe({**VALID, 3: 4}), "Recipe: found the key 3, expected text"),
    ],
)
def test_arguments_of_other_types_are_named(call, fault):
    with pytest.raises(RecipeError) as refused:
        call()
    assert str(refused.value).startswith(fault)


def test_runs_and_callbacks_of_other_types_are_named():
    with pytest.raises(RunError, match="path: found None, expected the path of a run directory"):
        load_run(None)
    with pytest.raises(TypeError, match="callbacks: found 3, expected a Callback"):
        Callbacks([Callback(), 3])
    assert Recipe.load("smoke", (text for text in ["rounds=2"])).rounds == 2
