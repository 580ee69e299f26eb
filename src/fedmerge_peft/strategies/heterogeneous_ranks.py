"""Base class of strategies whose clients may have different LoRA ranks."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import (
    LayerFactors,
    layer_factors,
    rank_mask,
    update_inner_product,
)
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.training.plan import Plan, Train


class HeterogeneousRanks(OneHotStrategy):
    """Strategy in which a client of rank r_i uses the first r_i of the r ranks of LoRA.

    The client's other ranks are zero and do not train. LoRA's scaling is the same for all clients:
    it depends on r, not on r_i. The soup has one row for each distinct r_i.
    """

    averages = False

    def __init__(
        self,
        recipe: recipes.FlexLoraRecipe | recipes.FLoraRecipe | recipes.FedExLoraRecipe,
        context: StrategyContext,
    ) -> None:
        try:
            self.factors = layer_factors(context.layout)
        except ValueError as error:
            raise RecipeError(
                f"lora: {recipe.name} cannot use this adapter: {error}; "
                "use plain LoRA on linear layers, with lora.merge: factor"
            ) from error
        max_rank = max((layer.rank for layer in self.factors), default=0)
        ranks = recipe.ranks or [max_rank]
        if max(ranks) > max_rank:
            raise RecipeError(
                f"strategy.ranks: {max(ranks)} exceeds the adapter's rank of {max_rank}; "
                "lower it, or raise lora.r"
            )
        distinct = sorted(set(ranks[: context.clients]))
        self.ranks = [ranks[client % len(ranks)] for client in range(context.clients)]
        self.assigned = torch.tensor([distinct.index(rank) for rank in self.ranks])
        self.plain = ~rank_mask(context.layout, slice)
        """Parameters that are not factors, such as heads: a mask ``(P,)``."""
        self.masks = torch.stack(
            [self.plain | rank_mask(context.layout, _first_ranks(rank)) for rank in distinct]
        )
        """Parameters that the clients of each distinct rank train, ``(d, P)`` bool."""
        self.context = context
        self.soup = self._soup(context.fresh_row(0))

    def plan(self, client: int) -> Plan:
        mask = self.masks[self.assigned[client]]
        return Train(self.adapter(client), phases=(None if bool(mask.all()) else mask,))

    def adapter_size(self, client: int) -> int:
        """Return the number of parameters in the client's adapter."""
        return int(self.masks[self.assigned[client]].sum())

    @abstractmethod
    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        """Return the update B A of a layer that the client is sent next, without LoRA's scaling.

        The update is relative to the backbone with which the client last trained. It includes what
        the server has added to the backbone since then.

        Returns:
            The pair A ``(k, in)`` and B ``(out, k)``, and ‖B A‖_F². k is r, or larger if the
            factors of several clients are stacked.
        """

    def gap(self, reply: Reply, trained: Tensor) -> float:
        """Compute the gap of ``Strategy.gap`` between updates instead of factors:

        √(Σ_layers s² ‖B_i A_i (trained) − B A (sent next)‖_F² + ‖·‖² of all other parameters)

        The same update can have different factors in each round.
        """
        (row,) = trained
        square = float((row - self.adapter(reply.client))[self.plain].double().square().sum())
        for layer in self.factors:
            trained_factors = layer.split(row)
            next_factors, next_square = self.next_update(layer, reply.client)
            distance = (
                update_inner_product(trained_factors, trained_factors)
                - 2 * update_inner_product(trained_factors, next_factors)
                + next_square
            )
            square += self.context.scaling[layer.module] ** 2 * max(distance, 0.0)
        return math.sqrt(square)

    def _soup(self, row: Tensor) -> AdapterSoup:
        """Return a soup with the row ``(P,)``, reduced to rank r_i, for each distinct r_i."""
        return AdapterSoup(
            torch.where(self.masks, row, 0.0), self.context.layout, self.context.shared
        )


def _first_ranks(rank: int) -> Callable[[int], slice]:
    return lambda _: slice(rank)
