"""Strategies whose clients are each served with one row of the soup."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Strategy


class Assigned(Strategy):
    """Client i is served with row ``assigned[i]`` of the soup: merging weights of zeros and one 1."""

    state_fields: ClassVar[tuple[str, ...]] = ("assigned",)

    assigned: Tensor
    """``(clients,)`` int64."""

    @property
    def weights(self) -> Tensor:
        return torch.zeros(len(self.assigned), len(self.soup)).scatter_(
            1, self.assigned[:, None], 1.0
        )

    def adapter(self, client: int) -> Tensor:
        return self.soup.rows[self.assigned[client]].clone()
