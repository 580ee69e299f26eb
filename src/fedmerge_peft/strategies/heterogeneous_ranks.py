"""Clients of different ranks in one slot."""

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
from fedmerge_peft.strategies.assigned import Assigned
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.training.plan import Plan, Train


class Ranked(Assigned):
    """A client of rank r_i has the first r_i of the slot's r ranks; the others are zero, and do not train.

    The slot's scaling (alpha / r) holds for all: it does not change with r_i. The soup has a row for each rank that some client has.
    """

    averages = False

    def __init__(
        self, recipe: recipes.FlexLoraRecipe | recipes.FLoraRecipe, context: StrategyContext
    ) -> None:
        try:
            self.factors = layer_factors(context.layout)
        except ValueError as error:
            raise RecipeError(
                [
                    f"strategy.name: {recipe.name} cannot work on this adapter: {error}; use plain LoRA, with lora.merge: factor"
                ]
            ) from error
        most = max((layer.rank for layer in self.factors), default=0)
        ranks = recipe.ranks or [most]
        if max(ranks) > most:
            raise RecipeError(
                [
                    f"strategy.ranks: {max(ranks)} is more than the adapter's rank of {most}; lower it, or raise lora.r"
                ]
            )
        kinds = sorted(set(ranks[: context.clients]))
        self.ranks = [ranks[client % len(ranks)] for client in range(context.clients)]
        self.assigned = torch.tensor([kinds.index(rank) for rank in self.ranks])
        self.plain = ~rank_mask(context.layout, slice)
        """What does not belong to the factors, such as heads: a mask ``(P,)``."""
        self.masks = torch.stack(
            [self.plain | rank_mask(context.layout, _first(rank)) for rank in kinds]
        )
        """What clients of each rank have, ``(d, P)``."""
        self.context = context
        self.soup = self._soup(context.fresh_row(0))

    def plan(self, client: int) -> Plan:
        mask = self.masks[self.assigned[client]]
        return Train(self.adapter(client), phases=(None if bool(mask.all()) else mask,))

    def held(self, client: int) -> int:
        """How many numbers of an adapter this client has."""
        return int(self.masks[self.assigned[client]].sum())

    @abstractmethod
    def next_update(self, layer: LayerFactors, client: int) -> tuple[tuple[Tensor, Tensor], float]:
        """What this client gets next in a layer, on the backbone that it trained on: A and B, and ‖B A‖_F²."""

    def gap(self, reply: Reply, trained: Tensor) -> float:
        """As ``Strategy.gap``, but between updates, as the factors of one and the same update differ from round to round:

        √(Σ_layers s² ‖B_i A_i (trained) − B A (sent next)‖_F² + ‖·‖² of heads and what else does not belong to the factors)
        """
        (row,) = trained
        square = float((row - self.adapter(reply.client))[self.plain].double().square().sum())
        for layer in self.factors:
            trained_to, (sent_next, length) = (
                layer.split(row),
                self.next_update(layer, reply.client),
            )
            distance = (
                update_inner_product(trained_to, trained_to)
                - 2 * update_inner_product(trained_to, sent_next)
                + length
            )
            square += self.context.scaling[layer.module] ** 2 * max(distance, 0.0)
        return math.sqrt(square)

    def _soup(self, row: Tensor) -> AdapterSoup:
        """The soup in which a client of each rank has its part of this row ``(P,)``."""
        return AdapterSoup(
            torch.where(self.masks, row, 0.0), self.context.layout, self.context.shared
        )


def _first(rank: int) -> Callable[[int], slice]:
    return lambda _: slice(rank)
