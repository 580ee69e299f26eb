"""Server-side methods, one a file."""

from collections.abc import Callable
from typing import Any

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext
from fedmerge_peft.strategies.ditto import Ditto
from fedmerge_peft.strategies.fedavg import FedAvg, FedProx
from fedmerge_peft.strategies.fedavg_finetuned import FedAvgFinetuned
from fedmerge_peft.strategies.feddpa import FedDPA
from fedmerge_peft.strategies.fedem import FedEM
from fedmerge_peft.strategies.fedmerge import FedMerge
from fedmerge_peft.strategies.fesem import FeSEM
from fedmerge_peft.strategies.flexlora import FlexLora
from fedmerge_peft.strategies.flhc import FLHC
from fedmerge_peft.strategies.flora import FLora
from fedmerge_peft.strategies.ifca import IFCA
from fedmerge_peft.strategies.local import Local
from fedmerge_peft.strategies.partly_shared import FedRep, FedSALora, FFALora
from fedmerge_peft.strategies.server_step import fedmerge_step

__all__ = [
    "FedAvg",
    "FedMerge",
    "Local",
    "Reply",
    "Start",
    "Strategy",
    "fedmerge_step",
    "make_strategy",
]

_METHODS: dict[type[recipes.StrategySection], Callable[[Any, StrategyContext], Strategy]] = {
    recipes.FedMergeRecipe: FedMerge,
    recipes.FedAvgRecipe: FedAvg,
    recipes.FedAvgFinetunedRecipe: FedAvgFinetuned,
    recipes.FedProxRecipe: FedProx,
    recipes.LocalRecipe: Local,
    recipes.DittoRecipe: Ditto,
    recipes.FedRepRecipe: FedRep,
    recipes.FedDPARecipe: FedDPA,
    recipes.IFCARecipe: IFCA,
    recipes.FeSEMRecipe: FeSEM,
    recipes.FLHCRecipe: FLHC,
    recipes.FedEMRecipe: FedEM,
    recipes.FFALoraRecipe: FFALora,
    recipes.FedSALoraRecipe: FedSALora,
    recipes.FlexLoraRecipe: FlexLora,
    recipes.FLoraRecipe: FLora,
}


def make_strategy(recipe: recipes.StrategySection, context: StrategyContext) -> Strategy:
    """The strategy that a recipe names, at its start. Raises ``RecipeError`` where it does not fit the adapter, or the defence."""
    strategy = _METHODS[type(recipe)](recipe, context)
    strategy.aggregator = context.aggregator
    if context.aggregator.recipe.defends and strategy.federated and not strategy.averages:
        raise RecipeError(
            [
                f"robustness: {recipe.name} stacks the clients' factors and has no mean to defend; use another strategy"
            ]
        )
    return strategy
