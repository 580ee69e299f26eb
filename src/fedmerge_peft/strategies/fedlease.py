"""FedLEASE: one LoRA expert for each cluster; the silhouette determines the number of clusters.

Source: Wang et al. 2025, arXiv 2509.15087.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import silhouette_score
from torch import Tensor

from fedmerge_peft.adapters import merging_weights
from fedmerge_peft.adapters.lora_factors import A_SUFFIXES, B_SUFFIXES, RANDOM_INIT_SUFFIXES
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack_replies
from fedmerge_peft.strategies.clustering import ServerClustering, cluster_means
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.strategies.similarity import cosines
from fedmerge_peft.training.plan import Plan, Train

_LEARNED = tuple({*A_SUFFIXES, *B_SUFFIXES} - {*RANDOM_INIT_SUFFIXES})
"""Suffixes of the factors that PEFT initializes with zeros: B, and on embeddings A."""


class FedLEASE(ServerClustering):
    """Warm-up of each client alone, clustering by the clients' B, then FedAvg in each cluster.

    After the warm-up, the distance of two clients over the L adapted layers is

        d(i, k) = 1/L Σ_l (1 − cos(B_i^l, B_k^l))

    Agglomerative clustering with average linkage is cut at each number of clusters from 2 to
    ``adapters``. The cut with the highest mean silhouette determines the experts:

        Θ_j ← mean of the members' adapters after the warm-up, then FedAvg of the members in each
        round, in which all members have the same weight

    The server optimizer performs the steps of FedAvg. The first means are set without it. With
    momentum or Adam, an expert whose members all pause still moves by its moments.

    If fewer than three clients are clustered, or with ``adapters: 1``, there is one expert. Heads
    and all other parameters belong to the expert. On embeddings, A starts at zero and takes the
    place of B. Unused rows of the soup contain the mean of the experts.

    Differences from the paper:

    - In the paper, a client also receives the other clusters' experts, and a router computes the
      weights of the experts for each token. A LoRA adapter has no router, so here a client uses the
      expert of its cluster alone.
    - In the paper, all clients take part in the warm-up. Here clients are clustered once
      ``adapters`` + 1 of them have replied, or all if there are fewer. ``ServerClustering``
      describes the clients that join later.
    """

    state_fields = (*ServerClustering.state_fields, "experts", "server")
    further_clients = 1  # the silhouette requires fewer clusters than clients

    def __init__(self, recipe: recipes.FedLEASERecipe, context: StrategyContext) -> None:
        super().__init__(recipe.adapters, context)
        self.warm_phases = (None,) * recipe.warm_passes
        self.layers = [
            entry.columns for entry in context.layout.entries if entry.key.endswith(_LEARNED)
        ]
        """Columns of B (of A on embeddings) in each layer."""
        if not self.layers:
            raise RecipeError(
                "strategy.name: fedlease compares the clients' B, but this adapter has none; "
                "adapt layers with LoRA (lora.target_modules)"
            )
        self.experts = 1
        """Number of experts. The experts are the first rows of the soup."""
        self.server = ServerOptimizer(recipe, self.soup.rows)

    def plan(self, client: int) -> Plan:
        if self.unclustered is not None:
            return Train(self.adapter(client), phases=self.warm_phases)
        return Train(self.adapter(client))

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, _ = stack_replies(replies)
        deltas = self.aggregator.clip(deltas)
        if self.unclustered is None:
            known = self.assign_newcomers(clients, deltas, self.experts)
            means = self._means(deltas[known], self.clusters[clients[known]])
            self._replace(self.server.step(self.soup.rows, means))
            return
        self.unclustered.replace(clients, deltas)
        if self.clients_needed():
            return
        trained = self.unclustered.means()
        clusters = clusters_by_silhouette(self.distances(trained), len(self.soup))
        self.clusters[self.unclustered.clients] = clusters
        self.experts = int(clusters.max()) + 1
        self.unclustered = None
        self._replace(self.soup.rows - self._means(trained, clusters))

    def distances(self, deltas: Tensor) -> Tensor:
        """Compute d of all pairs of clients, ``(k, k)`` float64, from their updates ``(k, P)``.

        B starts at zero, so the update of B is −B.
        """
        none = torch.zeros(1, deltas.shape[1])
        similarities = [cosines(deltas[:, layer], none[:, layer]) for layer in self.layers]
        return (1 - torch.stack(similarities).mean(dim=0)).clamp_min(0).fill_diagonal_(0)

    def warnings(self) -> list[str]:
        if self.unclustered is not None:
            return [
                "until clients are clustered, all are served the initial adapter; "
                f"clients still needed: {self.clients_needed()}"
            ]
        return merging_weights.weight_warnings(self.weights[:, : self.experts])

    def _means(self, deltas: Tensor, clusters: Tensor) -> Tensor:
        """Compute the mean update of each cluster, ``(d, P)``; zero for an empty cluster."""
        if not len(deltas):
            return torch.zeros_like(self.soup.rows)
        equal = torch.ones(len(deltas), dtype=torch.float64)
        return cluster_means(deltas, clusters, equal, len(self.soup), self.aggregator)

    def _replace(self, rows: Tensor) -> None:
        """Set the experts to the first of these rows ``(d, P)``.

        Unused rows become the mean of the experts.
        """
        experts = rows[: self.experts]
        unused = len(rows) - self.experts
        self.soup.rows = torch.cat([experts, experts.mean(dim=0, keepdim=True).expand(unused, -1)])


def clusters_by_silhouette(distances: Tensor, most: int) -> Tensor:
    """Cut the tree of average linkage at the number of clusters with the best mean silhouette.

    Args:
        distances: Distances of all pairs, ``(m, m)`` float64, with a diagonal of zeros.
        most: Largest number of clusters. The silhouette requires at least two clusters, and fewer
            clusters than clients. If this is impossible, the result is one cluster.

    Returns:
        Cluster of each client, ``(m,)`` int64, from 0.
    """
    points = distances.numpy()
    best, clusters = -1.0, torch.zeros(len(distances), dtype=torch.int64)
    for count in range(2, min(most, len(distances) - 1) + 1):
        tree = AgglomerativeClustering(count, metric="precomputed", linkage="average")
        labels = tree.fit_predict(points)
        score = float(silhouette_score(points, labels, metric="precomputed"))
        if score > best:
            best, clusters = score, torch.from_numpy(labels).long()
    return clusters
