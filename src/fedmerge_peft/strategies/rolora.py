"""RoLoRA: rounds that train B alternate with rounds that train A.

Source: Chen et al. 2025, arXiv 2502.01755.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import (
    A_SUFFIXES,
    B_SUFFIXES,
    RANDOM_INIT_SUFFIXES,
    suffix_mask,
)
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import mean_delta
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import Plan, Train


class RoLora(OneHotStrategy):
    """FedAvg of one factor in each round. The other factor is frozen and equal for all clients:

    odd rounds:   B ← Σ_i ρ_i B_i,  so that  Σ_i ρ_i B_i A = B A  exactly
    even rounds:  A ← Σ_i ρ_i A_i,  so that  Σ_i ρ_i B A_i = B A  exactly

    B trains first, because A has no gradient while B = 0. On embeddings, PEFT initializes B at
    random and A with zeros, so A trains first. Heads and all other parameters that are not factors
    train in every round. The server optimizer has separate moments for the factors of odd rounds,
    the factors of even rounds and all other parameters. The moments of a part change only in rounds
    that train the part.

    A client returns the parameters that it trained. A client that took part in the previous round
    is sent only the parameters that trained in that round. Any other client is sent the whole
    adapter.
    """

    state_fields = (
        *OneHotStrategy.state_fields,
        "first_factors",
        "second_factors",
        "others",
        "rounds",
        "last_round",
    )

    def __init__(self, recipe: recipes.RoLoraRecipe, context: StrategyContext) -> None:
        factors = suffix_mask(context.layout, (*A_SUFFIXES, *B_SUFFIXES))
        random = suffix_mask(context.layout, RANDOM_INIT_SUFFIXES)
        if not random.any():
            raise RecipeError(
                "lora: rolora trains A and B in turn, but A is not trained in this adapter; "
                "adapt layers with LoRA (lora.target_modules), and set lora.merge: factor"
            )
        self.masks = (factors & ~random, random)
        """Masks of the factors that train in odd and in even rounds, each ``(P,)`` bool."""
        self.plain = ~factors
        """Parameters that are not factors, such as heads: a mask ``(P,)``."""
        self.soup = AdapterSoup(context.fresh_row(0)[None], context.layout, context.shared)
        rows = self.soup.rows
        self.first_factors, self.second_factors = (
            ServerOptimizer(recipe, rows[:, mask]) for mask in self.masks
        )
        self.others = ServerOptimizer(recipe, rows[:, self.plain])
        self.assigned = torch.zeros(context.clients, dtype=torch.int64)
        self.rounds = 0
        self.last_round = torch.zeros(context.clients, dtype=torch.int64)
        """Last round in which each client took part, from 1, ``(m,)`` int64; 0 before its first."""

    def trained(self, rounds: int) -> Tensor:
        """Return a mask ``(P,)`` of the columns that train in the round after ``rounds`` rounds."""
        return self.masks[rounds % 2] | self.plain

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.trained(self.rounds),))

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        trained = self.trained(self.rounds)
        rows = self.soup.rows.clone()
        gradient = torch.zeros_like(rows)
        gradient[:, trained] = mean_delta(replies, self.aggregator, trained)
        factors = self.second_factors if self.rounds % 2 else self.first_factors
        for mask, server in ((self.masks[self.rounds % 2], factors), (self.plain, self.others)):
            rows[:, mask] = server.step(rows[:, mask], gradient[:, mask])
        self.soup.rows = rows
        self.rounds += 1
        self.last_round[[reply.client for reply in replies]] = self.rounds

    def traffic(self, client: int) -> tuple[int, int]:
        has_the_rest = self.rounds > 0 and int(self.last_round[client]) == self.rounds
        down = self.trained(self.rounds - 1).sum() if has_the_rest else self.soup.layout.size
        return int(down), int(self.trained(self.rounds).sum())
