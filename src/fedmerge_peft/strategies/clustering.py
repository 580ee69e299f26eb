"""Base classes of clusterings: each client trains the adapter of the cluster it belongs to."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.strategies.aggregation import Aggregator
from fedmerge_peft.strategies.base import Strategy, StrategyContext
from fedmerge_peft.strategies.mean_updates import MeanUpdates
from fedmerge_peft.strategies.similarity import nearest_row


class Clustering(Strategy):
    """Strategy with one adapter for each cluster, and one-hot π_i that selects client i's cluster.

    A client without a cluster is served the mean of all adapters.
    """

    state_fields: ClassVar[tuple[str, ...]] = ("clusters",)
    learns_weights = True

    def __init__(self, rows: Tensor, context: StrategyContext) -> None:
        self.soup = AdapterSoup(rows, context.layout, context.shared)
        self.clusters = torch.full((context.clients,), -1 if len(rows) > 1 else 0)
        """Cluster of each client, ``(m,)`` int64; -1 for clients without a cluster."""

    @property
    def weights(self) -> Tensor:
        return self._weights_of(self.clusters)

    def adapter(self, client: int) -> Tensor:
        return self.soup.merge(self._weights_of(self.clusters[client, None])[0])

    def _weights_of(self, clusters: Tensor) -> Tensor:
        """Return π ``(k, d)`` of members of these clusters ``(k,)``."""
        one_hot = membership(clusters, len(self.soup)).float()
        return torch.where(clusters[:, None] < 0, 1 / len(self.soup), one_hot)


class ServerClustering(Clustering):
    """Clustering that the server first computes from the clients' updates of one common adapter.

    This needs replies (``MeanUpdates``) from as many clients as there are clusters, plus
    ``further_clients``, or from all clients if there are fewer. A client that joins later first
    trains the mean Θ̄ of the adapters. Its first reply δ_i assigns it to the cluster
    argmax_j cos(−δ_i, Θ_j − Θ̄) and does not update any adapter.
    """

    state_fields: ClassVar[tuple[str, ...]] = (*Clustering.state_fields, "unclustered")
    further_clients: ClassVar[int] = 0
    """Number of clients that must reply in addition to the number of clusters."""

    def __init__(self, adapters: int, context: StrategyContext) -> None:
        super().__init__(context.fresh_row(0).repeat(adapters, 1), context)
        self.unclustered: MeanUpdates | None = MeanUpdates(context)
        """Updates to cluster; None after the clustering."""

    def clients_needed(self) -> int:
        """Return the number of further clients that must reply before clusters are computed."""
        known = (
            len(self.unclustered.clients) if self.unclustered is not None else len(self.clusters)
        )
        wanted = len(self.soup) + self.further_clients
        return max(0, min(wanted, len(self.clusters)) - known)

    def assign_newcomers(self, clients: Tensor, deltas: Tensor, count: int | None = None) -> Tensor:
        """Assign a cluster to each client without one.

        Args:
            clients: Client indices, ``(k,)``.
            deltas: Their updates, ``(k, P)``.
            count: Number of clusters to choose from; None to choose from all rows of the soup.

        Returns:
            A mask ``(k,)``, True for clients that already had a cluster. Only their replies update
            adapters.
        """
        rows, known = self.soup.rows[:count], self.clusters[clients] >= 0
        self.clusters[clients[~known]] = nearest_row(deltas[~known], rows)
        return known


def membership(clusters: Tensor, count: int) -> Tensor:
    """Return a mask ``(m, count)`` of the members of each cluster; cluster -1 has no column."""
    return clusters[:, None] == torch.arange(count)


def cluster_means(
    vectors: Tensor, clusters: Tensor, sizes: Tensor, count: int, aggregator: Aggregator
) -> Tensor:
    """Compute Σ_i n_i v_i / Σ_i n_i over each cluster's members, or its robust form.

    Args:
        vectors: v, ``(k, P)``.
        clusters: Cluster of each vector, ``(k,)``; -1 for vectors without a cluster.
        sizes: n, ``(k,)``.
        count: Number of clusters.
        aggregator: Rule that combines the vectors of a cluster.

    Returns:
        Means, ``(count, P)``; zero for empty clusters.
    """
    return aggregator.combine(vectors, membership(clusters, count), sizes)
