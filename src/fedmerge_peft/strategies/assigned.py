"""Strategies whose clients are each served with one row of the soup."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import one_hot

from fedmerge_peft.strategies.base import Strategy


class Assigned(Strategy):
    """Client i is served with row ``assigned[i]`` of the soup: merging weights of zeros and one 1."""

    assigned: Tensor
    """``(clients,)`` int64."""

    @property
    def weights(self) -> Tensor:
        return one_hot(self.assigned, len(self.soup)).float()

    def adapter(self, client: int) -> Tensor:
        return self.soup.rows[self.assigned[client]].clone()

    def warnings(self) -> list[str]:
        return []  # the weights are not learned, so they cannot stand still
