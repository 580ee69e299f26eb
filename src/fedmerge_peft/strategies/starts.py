"""Initial adapters of FedMerge."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.util.row_storage import RowStorage


def initial_rows(
    recipe: recipes.FedMergeRecipe,
    context: StrategyContext,
    adapters: int,
    storage: RowStorage,
) -> Tensor:
    """Return Θ before the first round, ``(d, P)``.

    With ``start: noise``, the default storage draws different noise than the other storages.
    """
    if not storage.plain:
        return storage.store(_rows_in_turn(recipe, context, adapters), adapters)
    if recipe.start == "independent":
        return torch.stack([context.fresh_row(number) for number in range(adapters)])
    rows = context.fresh_row(0).repeat(adapters, 1)
    if recipe.start == "noise":
        generator = torch.Generator().manual_seed(context.seed)
        rows += recipe.start_noise * torch.randn(rows.shape, generator=generator)
    return rows


def _rows_in_turn(
    recipe: recipes.FedMergeRecipe, context: StrategyContext, adapters: int
) -> Iterator[Tensor]:
    """Yield the rows of Θ ``(P,)``, one in memory at a time."""
    common = context.fresh_row(0)
    generator = torch.Generator().manual_seed(context.seed)
    for number in range(adapters):
        if recipe.start == "independent":
            yield context.fresh_row(number)
        elif recipe.start == "noise":
            yield common + recipe.start_noise * torch.randn(common.shape, generator=generator)
        else:
            yield common
