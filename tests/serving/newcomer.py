"""A newcomer to a small run of the smoke recipe."""

import numpy as np

from fedmerge_peft import Recipe
from fedmerge_peft.data import Client, FederatedData
from fedmerge_peft.engines.local import LocalEngine
from fedmerge_peft.tasks.labels import relabel

QUEUES = ["amber", "blue", "coral", "denim", "emerald", "fuchsia"]
SMALL = [
    "rounds=1",
    "data.max_train=8",
    "data.max_test=6",
    "data.filter.provider=[Alder, Birch]",
    "strategy.adapters=3",
    "baselines=[]",
]
LEARNED, LOCAL = "learned weights", "local training"


def recipe(*overrides):
    return Recipe.load("smoke", [*SMALL, "training.device=cpu", *overrides])


def numbers(result, name):
    return next(method for method in result.methods if method.name == name)


def newcomer(run, table):
    table = relabel(table, "queue", run.task["labels"])
    rows = np.arange(len(table))
    return LocalEngine.from_data(
        run.recipe, FederatedData(table, [Client("newcomer", rows, rows[:0], rows[:0])])
    )
