"""What the clients' updates were over the rounds before clients are grouped."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.state import Stateful
from fedmerge_peft.strategies.base import Start


class MeanUpdates(Stateful):
    """δ̄_i: each client's mean update over the rounds in which it replied, whoever else did."""

    remembers = ("_sums", "_counts")

    def __init__(self, start: Start) -> None:
        self._sums = torch.zeros(start.clients, start.layout.size)
        self._counts = torch.zeros(start.clients)

    def add(self, clients: Tensor, deltas: Tensor) -> None:
        """Remember one round's updates ``(k, P)`` of these clients ``(k,)``."""
        self._sums[clients] += deltas
        self._counts[clients] += 1

    def put(self, clients: Tensor, deltas: Tensor) -> None:
        """Remember these updates in place of what these clients sent before."""
        self._sums[clients] = deltas
        self._counts[clients] = 1

    @property
    def clients(self) -> Tensor:
        """Who has replied, ``(k,)`` int64, ascending."""
        return torch.nonzero(self._counts).flatten()

    def means(self) -> Tensor:
        """δ̄ of those who have replied, ``(k, P)``."""
        seen = self.clients
        return self._sums[seen] / self._counts[seen, None]
