"""Base class of strategies that serve each client one row of the soup."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Strategy


class OneHotStrategy(Strategy):
    """Strategy with one-hot merging weights: client i is served row ``assigned[i]`` of the soup."""

    state_fields: ClassVar[tuple[str, ...]] = ("assigned",)

    assigned: Tensor
    """Row of the soup for each client, ``(clients,)`` int64."""

    @property
    def weights(self) -> Tensor:
        return torch.zeros(len(self.assigned), len(self.soup)).scatter_(
            1, self.assigned[:, None], 1.0
        )

    def adapter(self, client: int) -> Tensor:
        return self.soup.rows[self.assigned[client]].clone()
