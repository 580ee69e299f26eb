"""Division of LoRA's ranks into several adapters that are active at the same time."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.adapters.lora_factors import layer_factors, rank_mask
from fedmerge_peft.errors import RecipeError


def rank_halves(strategy: str, layout: AdapterLayout) -> tuple[Tensor, Tensor]:
    """Return masks ``(P,)`` of the first and the second half of the ranks of all factors.

    Both masks select their columns in the same order. If ``row[first]`` and ``row[second]`` are
    equal, both halves are the same adapter of half the rank.

    Args:
        strategy: Name of the strategy, for error messages.
        layout: Layout of the row.

    Raises:
        RecipeError: The adapter is not plain LoRA, or a layer's rank is odd.
    """
    first, second = rank_parts(strategy, layout, 2)
    odd = [
        f"{layer.module} has rank {layer.rank}" for layer in layer_factors(layout) if layer.rank % 2
    ]
    if odd:
        raise RecipeError(
            f"lora.r: {strategy} splits the ranks in half, but {odd[0]}; use an even rank"
        )
    return first, second


def rank_parts(strategy: str, layout: AdapterLayout, count: int) -> list[Tensor]:
    """Divide the ranks of all factors into consecutive parts; return a mask ``(P,)`` for each.

    In a layer of rank r, part k of n, counted from 0, contains the ranks from ⌊r k / n⌋ up to, but
    not including, ⌊r (k + 1) / n⌋.

    Args:
        strategy: Name of the strategy, for error messages.
        layout: Layout of the row.
        count: n, the number of parts.

    Raises:
        RecipeError: The adapter is not plain LoRA, or a layer's rank is less than n.
    """
    try:
        layers = layer_factors(layout)
        parts = [
            rank_mask(layout, partial(_part, number=number, count=count)) for number in range(count)
        ]
    except ValueError as error:
        raise RecipeError(
            f"strategy.name: {strategy} cannot split this adapter: {error}; "
            "use plain LoRA on linear layers, with lora.merge: factor"
        ) from error
    if small := [layer for layer in layers if layer.rank < count]:
        raise RecipeError(
            f"lora.r: {strategy} splits the ranks into {count} parts, but {small[0].module} "
            f"has rank {small[0].rank}; use a rank of at least {count}"
        )
    return parts


def _part(rank: int, number: int, count: int) -> slice:
    return slice(rank * number // count, rank * (number + 1) // count)
