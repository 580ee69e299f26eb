"""FedAvg: one global adapter for everyone (McMahan et al. 2017, arXiv 1602.05629; on LoRA it is known as FedIT)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import schema
from fedmerge_peft.strategies.base import Reply, Start, Strategy, stack


class FedAvg(Strategy):
    """θ ← θ − η Σ_i ρ_i δ_i with ρ_i = n_i / n over the clients that replied (algorithm 1)."""

    def __init__(self, recipe: schema.FedAvg, start: Start) -> None:
        self.server_lr = recipe.server_lr
        self.soup = AdapterSoup(start.fresh_row(0)[None], start.layout, start.shared)
        self._weights = torch.ones(start.clients, 1)

    @property
    def weights(self) -> Tensor:
        return self._weights

    def update(self, replies: Iterable[Reply]) -> None:
        _, deltas, sizes = stack(replies)
        shares = (sizes / sizes.sum()).to(deltas)
        self.soup.rows = self.soup.rows - self.server_lr * (shares @ deltas)
