"""Recipes made in Python are refused in the same words as those of files."""

import copy
import pickle
from pathlib import Path

import numpy as np
import pytest

from fedmerge_peft import Recipe, RecipeError
from fedmerge_peft.recipe.lora import LoraRecipe
from fedmerge_peft.recipe.schema import BackboneRecipe
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
        ({"baselines": ["local", "local"]}, "Recipe: baselines: duplicate strategies local"),
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
