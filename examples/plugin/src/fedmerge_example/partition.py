"""Clients whose sizes follow a power law."""

from __future__ import annotations

import numpy as np
from pydantic import NonNegativeFloat, PositiveInt

from fedmerge_peft import ClientRows, PartitionRecipe, Splits, register_partition


class PowerLawRecipe(PartitionRecipe):
    """Examples dealt at random to clients of very different sizes: n_i ∝ 1 / i^exponent."""

    clients: PositiveInt
    """Number of clients."""
    exponent: NonNegativeFloat = 1.0
    """Inequality of the sizes; 0 is equal."""


@register_partition("power-law", recipe=PowerLawRecipe)
def power_law(recipe: PowerLawRecipe, splits: Splits) -> dict[str, list[ClientRows]]:
    """Deal the training rows; the package partitions the other splits in the same proportions."""
    rows = splits.rng("train").permutation(len(splits.tables["train"]))
    sizes = 1 / np.arange(1, recipe.clients + 1) ** recipe.exponent
    cuts = np.floor(np.cumsum(sizes / sizes.sum())[:-1] * len(rows)).astype(np.int64)
    parts = np.split(rows, cuts)
    return {
        "train": [
            ClientRows(f"client-{number:02}", np.sort(part)) for number, part in enumerate(parts)
        ]
    }
