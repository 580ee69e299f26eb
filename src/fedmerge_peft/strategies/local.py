"""Local training: each client trains alone, from a common initial adapter."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext


class Local(Strategy):
    """Local training, θ_i ← θ_i − δ_i. The soup has one row for each client, and π = I."""

    adapters_per_client = 1

    def __init__(self, recipe: recipes.LocalRecipe, context: StrategyContext) -> None:
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(context.clients, 1), context.layout, context.shared
        )

    @property
    def weights(self) -> Tensor:
        return torch.eye(len(self.soup))

    def adapter(self, client: int) -> Tensor:
        return self.soup.rows[client].clone()

    def traffic(self, client: int) -> tuple[int, int]:
        return 0, 0

    def update(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            self.soup.rows[reply.client] -= reply.delta
