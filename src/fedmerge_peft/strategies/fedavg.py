"""FedAvg and FedProx: one global adapter for all clients.

Source: McMahan et al. 2017, arXiv 1602.05629. FedAvg with LoRA is also known as FedIT.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.recipe.strategy_base import ServerRecipe
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack_replies
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import Plan, Train


class FedAvg(Strategy):
    """θ ← θ − η Σ_i ρ_i δ_i with ρ_i = n_i / n over the clients that replied (algorithm 1)."""

    state_fields: ClassVar[tuple[str, ...]] = ("server",)

    def __init__(self, recipe: ServerRecipe, context: StrategyContext) -> None:
        self.soup = AdapterSoup(context.fresh_row(0)[None], context.layout, context.shared)
        self.server = ServerOptimizer(recipe, self.soup.rows)
        self.columns: Tensor | slice = slice(None)
        """Columns that train and travel: a mask ``(P,)``, or a slice that selects all."""
        self._weights = torch.ones(context.clients, 1)

    @property
    def weights(self) -> Tensor:
        return self._weights

    def adapter(self, client: int) -> Tensor:
        return self.soup.rows[0].clone()

    def update(self, replies: Iterable[Reply]) -> None:
        gradient = torch.zeros_like(self.soup.rows)
        gradient[:, self.columns] = mean_delta(replies, self.aggregator, self.columns)
        self.soup.rows = self.server.step(self.soup.rows, gradient)


class FedProx(FedAvg):
    """FedAvg whose clients minimize ℓ_i(θ) + μ/2 ‖θ − θ_sent‖².

    Source: Li et al. 2020, arXiv 1812.06127, equation 2.
    """

    def __init__(self, recipe: recipes.FedProxRecipe, context: StrategyContext) -> None:
        super().__init__(recipe, context)
        self.mu = recipe.mu

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), proximal=self.mu / 2)


def mean_delta(
    replies: Iterable[Reply], aggregator: Aggregator, columns: Tensor | slice = slice(None)
) -> Tensor:
    """Compute Σ_i ρ_i δ_i of the clients' first deltas, or its robust form.

    ρ_i is client i's fraction of the examples of all clients that replied.

    Args:
        replies: Replies of at least one client.
        aggregator: Rule that clips and combines the deltas.
        columns: Shared columns: a mask ``(P,)``, or a slice.

    Returns:
        The combined update, with one value for each shared column.
    """
    _, deltas, sizes = stack_replies(replies)
    return aggregator.combine(
        aggregator.clip(deltas[:, columns]), torch.ones(len(sizes), 1), sizes
    )[0]
