"""Server-side methods, one per module."""

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.strategies import StrategyRecipe
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext
from fedmerge_peft.strategies.server_step import fedmerge_step

__all__ = [
    "Reply",
    "Strategy",
    "StrategyContext",
    "fedmerge_step",
    "make_strategy",
]


def make_strategy(recipe: StrategyRecipe, context: StrategyContext) -> Strategy:
    """Return a new strategy for a recipe.

    Raises ``RecipeError`` if it does not support the adapter's settings or the robust aggregation.
    """
    strategy: Strategy = STRATEGIES[recipe.name].load()(recipe, context)
    strategy.aggregator = context.aggregator
    if context.aggregator.recipe.defends and recipe.federated and not strategy.averages:
        raise RecipeError(
            [
                f"robustness: {recipe.name} stacks the clients' factors and has no mean to defend; "
                "use another strategy"
            ]
        )
    return strategy
