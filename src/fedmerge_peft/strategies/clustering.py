"""What clusterings have in common: a client belongs to one adapter, and each adapter learns from its own clients."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.base import Strategy, StrategyContext
from fedmerge_peft.strategies.mean_updates import MeanUpdates


class Clustering(Strategy):
    """π_i is one-hot at the client's cluster; a client that has none yet is served with the mean of all adapters."""

    state_fields: ClassVar[tuple[str, ...]] = ("clusters",)
    learns_weights = True

    def __init__(self, rows: Tensor, context: StrategyContext) -> None:
        self.soup = AdapterSoup(rows, context.layout, context.shared)
        self.clusters = torch.full((context.clients,), -1 if len(rows) > 1 else 0)
        """Each client's cluster, ``(m,)`` int64; -1 for those that have none yet."""

    @property
    def weights(self) -> Tensor:
        belongs = members(self.clusters, len(self.soup)).float()
        return torch.where(self.clusters[:, None] < 0, 1 / len(self.soup), belongs)


class ServerClustering(Clustering):
    """Clusters that the server finds, once and from one common adapter, in the clients' updates (``MeanUpdates``).

    That waits until as many clients as clusters have replied. A client that comes later trains the mean of the adapters, Θ̄, which is
    no cluster's own: its first reply δ_i places it where its training leads, argmax_j cos(−δ_i, Θ_j − Θ̄), and moves no adapter.
    """

    state_fields: ClassVar[tuple[str, ...]] = (*Clustering.state_fields, "unclustered")

    def __init__(self, adapters: int, context: StrategyContext) -> None:
        super().__init__(context.fresh_row(0).repeat(adapters, 1), context)
        self.unclustered: MeanUpdates | None = MeanUpdates(context)
        """Until clusters are found: what to find them in."""

    def missing(self) -> int:
        """How many more clients must reply before they can be clustered."""
        known = (
            len(self.unclustered.clients) if self.unclustered is not None else len(self.clusters)
        )
        return max(0, min(len(self.soup), len(self.clusters)) - known)

    def place(self, clients: Tensor, deltas: Tensor) -> Tensor:
        """Give those who have none a cluster; returns whose replies count, ``(k,)`` bool: those of the others."""
        rows, known = self.soup.rows, self.clusters[clients] >= 0
        directions = normalize(rows - rows.mean(dim=0), dim=1)
        self.clusters[clients[~known]] = (-deltas[~known] @ directions.T).argmax(dim=1)
        return known


def members(clusters: Tensor, count: int) -> Tensor:
    """Which client belongs to which cluster, ``(m, count)`` bool; -1 belongs to none."""
    return clusters[:, None] == torch.arange(count)


def means(
    vectors: Tensor, clusters: Tensor, sizes: Tensor, count: int, aggregator: Aggregator
) -> Tensor:
    """Each cluster's mean Σ_i n_i v_i / Σ_i n_i over its members i, or what a defence has in its place, ``(count, P)``; zero for none.

    Args:
        vectors: v, ``(k, P)``.
        clusters: The cluster of each, ``(k,)``; -1 for none.
        sizes: n, ``(k,)``.
        count: Number of clusters.
        aggregator: Makes one of several.
    """
    return aggregator.combine(vectors, members(clusters, count), sizes)
