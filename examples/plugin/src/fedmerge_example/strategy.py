"""FedAvg that trusts an update less, the farther it is from the mean of all updates."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import NonNegativeFloat
from torch import Tensor

from fedmerge_peft import (
    AdapterSoup,
    Reply,
    Strategy,
    StrategyContext,
    StrategyRecipe,
    register_strategy,
)
from fedmerge_peft.strategies import stack_replies


class CautiousRecipe(StrategyRecipe):
    """FedAvg that trusts an update less, the farther it is from the mean of all updates."""

    caution: NonNegativeFloat = 1.0
    """Rate at which trust falls with the distance; 0 is FedAvg."""

    shared_soup = True  # its adapter may serve any client, including newcomers


@register_strategy("cautious", recipe=CautiousRecipe)
class Cautious(Strategy):
    """θ ← θ − Σ_i w_i δ_i with w_i ∝ n_i exp(−caution ‖δ_i − δ̄‖ / ‖δ̄‖)."""

    def __init__(self, recipe: CautiousRecipe, context: StrategyContext) -> None:
        self.caution = recipe.caution
        self.soup = AdapterSoup(context.fresh_row(0)[None], context.layout, context.shared)
        self._weights = torch.ones(context.clients, 1)

    @property
    def weights(self) -> Tensor:
        return self._weights

    def update(self, replies: Iterable[Reply]) -> None:
        _, deltas, sizes = stack_replies(replies)  # (k,), (k, P), (k,)
        deltas = self.aggregator.clip(deltas)
        mean = (sizes / sizes.sum()).to(deltas) @ deltas
        away = (deltas - mean).norm(dim=1) / mean.norm().clamp_min(1e-12)
        trust = torch.exp(-self.caution * away)[:, None]
        self.soup.rows = self.soup.rows - self.aggregator.combine(deltas, trust, sizes)
