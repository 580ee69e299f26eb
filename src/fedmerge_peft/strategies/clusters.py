"""What clusterings have in common: a client belongs to one adapter, and each adapter learns from its own clients."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.strategies.base import Start, Strategy


class Clustering(Strategy):
    """π_i is one-hot at the client's cluster; a client that has none yet is served with the mean of all adapters."""

    learns_weights = True

    def __init__(self, rows: Tensor, start: Start) -> None:
        self.soup = AdapterSoup(rows, start.layout, start.shared)
        self.clusters = torch.full((start.clients,), -1)
        """Each client's cluster, ``(m,)`` int64; -1 for those that have none yet."""

    @property
    def weights(self) -> Tensor:
        belongs = members(self.clusters, len(self.soup)).float()
        return torch.where(self.clusters[:, None] < 0, 1 / len(self.soup), belongs)


def members(clusters: Tensor, count: int) -> Tensor:
    """Which client belongs to which cluster, ``(m, count)`` bool; -1 belongs to none."""
    return clusters[:, None] == torch.arange(count)


def means(vectors: Tensor, clusters: Tensor, sizes: Tensor, count: int) -> Tensor:
    """Each cluster's mean Σ_i n_i v_i / Σ_i n_i over its members i, ``(count, P)``; zero for a cluster without any.

    Args:
        vectors: v, ``(k, P)``.
        clusters: The cluster of each, ``(k,)``; -1 for none.
        sizes: n, ``(k,)``.
        count: Number of clusters.
    """
    counted = members(clusters, count) * sizes[:, None].double()
    shares = counted / counted.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return shares.T.to(vectors) @ vectors
