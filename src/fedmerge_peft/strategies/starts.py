"""Initial adapters of FedMerge."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import StrategyContext


def initial_rows(recipe: recipes.FedMergeRecipe, context: StrategyContext, adapters: int) -> Tensor:
    """Return Θ before the first round, ``(d, P)``."""
    if recipe.start == "independent":
        return torch.stack([context.fresh_row(number) for number in range(adapters)])
    rows = context.fresh_row(0).repeat(adapters, 1)
    if recipe.start == "noise":
        generator = torch.Generator().manual_seed(context.seed)
        rows += recipe.start_noise * torch.randn(rows.shape, generator=generator)
    return rows
