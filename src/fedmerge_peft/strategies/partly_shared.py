"""Adapters of which a part is global and the rest private, or frozen: FedRep, FedSA-LoRA and FFA-LoRA."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import A_SUFFIXES, RANDOM_INIT_SUFFIXES, suffix_mask
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.assigned import Assigned
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import FedAvg, mean_delta
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import Plan, Train


class PartlyShared(Assigned):
    """On the shared columns FedAvg, θ ← θ − η Σ_i ρ_i δ_i; on the others each client goes its own way, θ_i ← θ_i − δ_i.

    The soup has a row for each client, all alike in the shared columns; these alone travel.
    """

    state_fields = (*Assigned.state_fields, "server")

    def __init__(
        self, recipe: recipes.ServerRecipe, context: StrategyContext, shared: Tensor
    ) -> None:
        """``shared`` is a mask ``(P,)``."""
        self.shared = shared
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(context.clients, 1), context.layout, context.shared
        )
        self.server = ServerOptimizer(recipe, self.soup.rows[:1, shared])
        self.assigned = torch.arange(context.clients)

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        common = self.server.step(
            self.soup.rows[:1, self.shared], mean_delta(replies, self.aggregator, self.shared)[None]
        )
        for reply in replies:
            self.soup.rows[reply.client] -= reply.delta
        self.soup.rows[:, self.shared] = common

    def traffic(self, client: int) -> tuple[int, int]:
        travels = int(self.shared.sum())
        return travels, travels


class FedRep(PartlyShared):
    """A shared body φ and a private head h_i (Collins et al. 2021, arXiv 2102.07078, algorithm 1). Each round a client trains

        h_i on ℓ_i(φ, h) with φ as sent,    then φ on ℓ_i(φ, h_i) with the new head

    for as long each as ``training`` says, and sends φ back. The head is what the recipe trains whole; the body is all the rest.
    """

    def __init__(self, recipe: recipes.FedRepRecipe, context: StrategyContext) -> None:
        self.head = torch.zeros(context.layout.size, dtype=torch.bool)
        self.head[context.layout.columns("head")] = True
        if not self.head.any():
            raise RecipeError(
                [
                    "strategy.name: fedrep keeps the head private and this adapter has none; name one in lora.modules_to_save"
                ]
            )
        super().__init__(recipe, context, ~self.head)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.head, ~self.head))


class FedSALora(PartlyShared):
    """A ← mean of the clients' A; each client keeps its B_i and head (Guo et al. 2025, arXiv 2410.01463).

    All of the adapter trains. What is neither factor nor head (trained biases, DoRA's magnitudes) stays private too.
    """

    def __init__(self, recipe: recipes.FedSALoraRecipe, context: StrategyContext) -> None:
        shared = suffix_mask(context.layout, A_SUFFIXES)
        if not shared.any():
            raise RecipeError(
                [
                    "strategy.name: fedsa_lora averages A, which does not train in this adapter; set lora.merge to factor"
                ]
            )
        super().__init__(recipe, context, shared)


class FFALora(FedAvg):
    """FedAvg on B and the head, with A frozen at its random start, the same for all (Sun et al. 2024, arXiv 2403.12313):

        B ← Σ_i ρ_i B_i,  so that  Σ_i ρ_i B_i A = B A  exactly.

    A comes from the seed and never travels. On embeddings it is PEFT's factor B that starts random, and so is frozen.
    """

    def __init__(self, recipe: recipes.FFALoraRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        self.columns = self.trained = ~suffix_mask(context.layout, RANDOM_INIT_SUFFIXES)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.trained,))

    def traffic(self, client: int) -> tuple[int, int]:
        travels = int(self.trained.sum())
        return travels, travels
