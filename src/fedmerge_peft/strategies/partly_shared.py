"""Adapters with shared columns: FedPer, FedRep, FedSA-LoRA and FFA-LoRA.

The other columns are private to each client (FedPer, FedRep, FedSA-LoRA), or frozen (FFA-LoRA).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.lora_factors import A_SUFFIXES, RANDOM_INIT_SUFFIXES, suffix_mask
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import FedAvg, mean_delta
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import Plan, Train


class PartialSharing(OneHotStrategy):
    """FedAvg on the shared columns and local training on the others:

    shared:   θ ← θ − η Σ_i ρ_i δ_i
    private:  θ_i ← θ_i − δ_i

    The soup has one row for each client. All rows are equal in the shared columns. Only the shared
    columns travel.
    """

    state_fields = (*OneHotStrategy.state_fields, "server")

    def __init__(
        self, recipe: recipes.ServerRecipe, context: StrategyContext, shared: Tensor
    ) -> None:
        """Create the initial soup; ``shared`` is a mask ``(P,)`` of the shared columns."""
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
        shared = int(self.shared.sum())
        return shared, shared


class FedPer(PartialSharing):
    """Shared body φ and private head h_i (Arivazhagan et al. 2019, arXiv 1912.00818, algorithm 1).

    In each round a client trains both at once, from φ as sent and its own last head:

        (φ_i, h_i) ← local training on ℓ_i(φ, h_i),    φ ← φ − η Σ_i ρ_i (φ − φ_i)

    The head consists of the modules that the recipe trains in full. The body is the rest of the
    adapter.
    """

    def __init__(self, recipe: recipes.ServerRecipe, context: StrategyContext) -> None:
        self.head = torch.zeros(context.layout.size, dtype=torch.bool)
        self.head[context.layout.columns("head")] = True
        if not self.head.any():
            raise RecipeError(
                [
                    f"strategy.name: {recipe.name} keeps the head private, but this adapter has "
                    "none; name one in lora.modules_to_save"
                ]
            )
        super().__init__(recipe, context, ~self.head)


class FedRep(FedPer):
    """FedPer whose clients train head and body in turn.

    In each round a client trains

        h_i on ℓ_i(φ, h) with φ as sent,    then φ on ℓ_i(φ, h_i) with the new head

    for the duration of ``training`` each, and returns φ. Source: Collins et al. 2021, arXiv
    2102.07078, algorithm 1.
    """

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.head, ~self.head))


class FedSALora(PartialSharing):
    """A ← mean of the clients' A, with private B_i and heads (Guo et al. 2025, arXiv 2410.01463).

    All of the adapter trains. Parameters that are neither factor nor head (trained biases, DoRA's
    magnitudes) are private as well.
    """

    def __init__(self, recipe: recipes.FedSALoraRecipe, context: StrategyContext) -> None:
        shared = suffix_mask(context.layout, A_SUFFIXES)
        if not shared.any():
            raise RecipeError(
                [
                    "strategy.name: fedsa_lora averages A, which is not trained in this adapter; "
                    "set lora.merge to factor"
                ]
            )
        super().__init__(recipe, context, shared)


class FFALora(FedAvg):
    """FedAvg of B and the head, with A frozen at a common random start:

        B ← Σ_i ρ_i B_i,  so that  Σ_i ρ_i B_i A = B A  exactly.

    A follows from the seed and never travels. On embeddings, PEFT initializes B at random, so there
    B is frozen. Source: Sun et al. 2024, arXiv 2403.12313.
    """

    def __init__(self, recipe: recipes.FFALoraRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        self.columns = self.trained = ~suffix_mask(context.layout, RANDOM_INIT_SUFFIXES)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.trained,))

    def traffic(self, client: int) -> tuple[int, int]:
        trained = int(self.trained.sum())
        return trained, trained
