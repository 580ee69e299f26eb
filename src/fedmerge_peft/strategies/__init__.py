"""Server-side methods, one a file."""

from collections.abc import Callable
from typing import Any

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Start, Strategy
from fedmerge_peft.strategies.fedavg import FedAvg, FedProx
from fedmerge_peft.strategies.fedmerge import FedMerge
from fedmerge_peft.strategies.local import Local
from fedmerge_peft.strategies.step import fedmerge_step

__all__ = ["FedAvg", "FedMerge", "Local", "Reply", "Start", "Strategy", "fedmerge_step", "make_strategy"]

_METHODS: dict[type[recipes.Strategy], Callable[[Any, Start], Strategy]] = {
    recipes.FedMerge: FedMerge,
    recipes.FedAvg: FedAvg,
    recipes.FedProx: FedProx,
    recipes.Local: Local,
}


def make_strategy(recipe: recipes.Strategy, start: Start) -> Strategy:
    """The strategy that a recipe names, at its start. Raises ``RecipeError`` where it does not fit the adapter."""
    return _METHODS[type(recipe)](recipe, start)
