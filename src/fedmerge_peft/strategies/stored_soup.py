"""FedMerge's soup in the recipe's storage, and the server step in bfloat16 or on disk."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.strategies.differential_privacy import PrivateAggregator
from fedmerge_peft.strategies.server_optimizer import Gradient, ServerOptimizer
from fedmerge_peft.strategies.starts import initial_rows
from fedmerge_peft.util.row_storage import (
    IN_MEMORY,
    RowStorage,
    StochasticRounding,
    column_chunks,
    read,
    write,
)
from fedmerge_peft.util.seeds import derive
from fedmerge_peft.util.stateful import Stateful


def make_soup(
    recipe: recipes.FedMergeRecipe, context: StrategyContext, adapters: int
) -> AdapterSoup:
    """Return a soup of d adapters, in the recipe's storage and before the first round.

    Raises:
        RecipeError: A soup in bfloat16 or on disk is computed in chunks of columns, but the
            aggregation rule compares whole updates, or ``privacy.mode: central`` adds noise to the
            sum of whole updates.
        RunError: The disk has no space for the soup.
    """
    storage = _storage(recipe, context)
    rows = initial_rows(recipe, context, adapters, storage)
    return AdapterSoup(rows, context.layout, context.shared, storage=storage)


def _storage(recipe: recipes.FedMergeRecipe, context: StrategyContext) -> RowStorage:
    if recipe.soup.plain:
        return IN_MEMORY
    aggregator = context.aggregator
    if isinstance(aggregator, PrivateAggregator):
        reason = recipe.privacy_refusal("central")
    else:
        reason = aggregator.recipe.refusal(recipe)
    if reason is not None:
        raise RecipeError(reason)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[recipe.soup.dtype]
    return RowStorage(dtype, recipe.soup.storage == "disk", context.folder)


def make_server(
    recipe: recipes.FedMergeRecipe, context: StrategyContext, soup: AdapterSoup
) -> ServerOptimizer | StoredSGD:
    """Return the server optimizer of a soup."""
    if soup.storage.plain:
        return ServerOptimizer(recipe, soup.rows)
    return StoredSGD(recipe.lr, soup.storage, context.seed)


class StoredSGD(Stateful):
    """SGD on a soup in bfloat16 or on disk, in chunks of columns. It has no state.

    Θ_j ← Θ_j − η Δ_j, where Δ_j is the combined update, is computed in float32. In a soup in
    bfloat16, the result is rounded at random (``StochasticRounding``).
    """

    def __init__(self, lr: float, storage: RowStorage, seed: int) -> None:
        self._lr, self._storage, self._seed = lr, storage, seed

    def step_columns(self, rows: Tensor, gradient: Gradient, round: int) -> Tensor:
        """Return the new rows ``(d, P)``. The argument ``rows`` ``(d, P)`` is not changed.

        Args:
            rows: Θ, ``(d, P)``.
            gradient: Function that computes Δ in some columns.
            round: Number of the round, from which the draws of the rounding follow.
        """
        rounding = StochasticRounding(derive(self._seed, "rounding", round))
        stepped = self._storage.empty(*rows.shape)
        for columns in column_chunks(rows):
            new = read(rows, columns) - self._lr * gradient(columns)
            new = rounding.round(new) if stepped.dtype == torch.bfloat16 else new
            write(stepped, columns, new)
        return stepped

    def set_default_momentum(self, momentum: float) -> None:
        """Do nothing, because a soup in bfloat16 or on disk has no moments."""

    def repeat(self, adapters: int) -> None:
        """Do nothing, because there are no moments to repeat."""
