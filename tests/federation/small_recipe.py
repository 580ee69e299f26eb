"""A small form of the smoke recipe: six clients, three adapters."""

from fedmerge_peft import Recipe

SMALL = [
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder, Birch]",
    "strategy.adapters=3",
    "training.device=cpu",
    "baselines=[]",
]


def recipe(*overrides):
    return Recipe.load("smoke", [*SMALL, *overrides])
