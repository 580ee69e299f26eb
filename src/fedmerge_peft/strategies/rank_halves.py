"""Two adapters of half the rank in one slot, for strategies that use two LoRAs at the same time."""

from __future__ import annotations

from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.adapters.lora_factors import layer_factors, rank_mask
from fedmerge_peft.errors import RecipeError


def rank_halves(strategy: str, layout: AdapterLayout) -> tuple[Tensor, Tensor]:
    """Return masks ``(P,)`` of the factors' first and second half of the ranks.

    The selected columns of both masks correspond to each other: ``row[first]`` and ``row[second]``
    are the same adapter of half the rank if they are equal.

    Args:
        strategy: Name of the strategy, for the errors.
        layout: Layout of the row.

    Raises:
        RecipeError: The adapter is not plain LoRA, or a layer's rank is odd.
    """
    try:
        odd = [
            f"{layer.module} has rank {layer.rank}"
            for layer in layer_factors(layout)
            if layer.rank % 2
        ]
        first = rank_mask(layout, lambda rank: slice(rank // 2))
        second = rank_mask(layout, lambda rank: slice(rank // 2, None))
    except ValueError as error:
        raise RecipeError(
            [
                f"strategy.name: {strategy} cannot halve this adapter: {error}; "
                "use plain LoRA with lora.merge: factor"
            ]
        ) from error
    if odd:
        raise RecipeError(
            [f"lora.r: {strategy} splits the ranks in half, but {odd[0]}; use an even rank"]
        )
    return first, second
