"""Division of LoRA's ranks into several adapters that are active at the same time."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.adapters.lora_factors import LayerFactors, layer_factors, rank_mask
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
    layers = _layers(strategy, layout)
    odd = [f"{layer.module} has rank {layer.rank}" for layer in layers if layer.rank % 2]
    if odd:
        raise RecipeError(
            f"lora.r: {strategy} splits the ranks in half, but {odd[0]}; use an even rank"
        )
    first, second = rank_parts(strategy, layout, 2)
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
    layers = _layers(strategy, layout)
    if small := [layer for layer in layers if layer.rank < count]:
        raise RecipeError(
            f"lora.r: {strategy} splits the ranks into {count} parts, but {small[0].module} "
            f"has rank {small[0].rank}; use a rank of at least {count}"
        )
    return [
        rank_mask(layout, partial(_part, number=number, count=count)) for number in range(count)
    ]


def _layers(strategy: str, layout: AdapterLayout) -> list[LayerFactors]:
    """Return the factors of all layers; raise ``RecipeError`` if the adapter is not plain LoRA."""
    try:
        return layer_factors(layout)
    except ValueError as error:
        raise RecipeError(
            f"lora: {strategy} cannot split this adapter: {error}; "
            "use plain LoRA on linear layers, with lora.merge: factor"
        ) from error


def _part(rank: int, number: int, count: int) -> slice:
    return slice(rank * number // count, rank * (number + 1) // count)
