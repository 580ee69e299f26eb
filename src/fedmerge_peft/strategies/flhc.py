"""FL+HC: FedAvg, then one FedAvg for each hierarchical cluster of the clients' updates.

Source: Briggs et al. 2020, arXiv 2004.11791.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import pairwise_distances
from torch import Tensor

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack_replies
from fedmerge_peft.strategies.clustering import ServerClustering, cluster_means


class FLHC(ServerClustering):
    """FedAvg of one adapter θ until the clients are clustered, then FedAvg in each cluster.

    In round ``warm_rounds``, or later if too few clients have replied by then, the server clusters
    the clients once (algorithm 1):

    before the clustering:   θ ← θ − Σ_i n_i δ_i / Σ_i n_i
    from the clustering on:  Θ_j ← Θ_j − Σ_{i in j} n_i δ_i / Σ_{i in j} n_i

    The round of the clustering is also the first round of each cluster's own FedAvg, because all
    clusters start from the same θ. The sums run over the clients that replied in the round. A
    cluster without a reply does not change.

    Differences from the paper:

    - In the paper, all clients train for the clustering. Here the clustering uses the last update
      of each client that has taken part by then.
    - The paper cuts the tree at a distance. Here the number of clusters is given, which makes
      methods comparable.
    """

    state_fields = (*ServerClustering.state_fields, "rounds")

    def __init__(self, recipe: recipes.FLHCRecipe, context: StrategyContext) -> None:
        super().__init__(recipe.adapters, context)
        self.recipe = recipe
        self.rounds = 0

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack_replies(replies)
        deltas = self.aggregator.clip(deltas)
        rows, count = self.soup.rows, len(self.soup)
        self.rounds += 1
        if self.unclustered is not None:
            self.unclustered.replace(clients, deltas)
            if self.rounds < self.recipe.warm_rounds or self.clients_needed():
                self.soup.rows = rows - cluster_means(
                    deltas, torch.zeros_like(clients), sizes, 1, self.aggregator
                )
                return
            self.clusters[self.unclustered.clients] = hierarchical_clusters(
                self.unclustered.means(), count, self.recipe.metric, self.recipe.linkage
            )
            self.unclustered = None
        known = self.assign_newcomers(clients, deltas)
        self.soup.rows = rows - cluster_means(
            deltas[known], self.clusters[clients[known]], sizes[known], count, self.aggregator
        )

    def warnings(self) -> list[str]:
        if self.rounds < self.recipe.warm_rounds:
            return [
                f"until clients are clustered after round {self.recipe.warm_rounds}, "
                f"flhc equals FedAvg; completed rounds: {self.rounds}"
            ]
        if needed := self.clients_needed():
            return [
                f"until clients are clustered, flhc equals FedAvg; clients still needed: {needed}"
            ]
        return super().warnings()


def hierarchical_clusters(deltas: Tensor, clusters: int, metric: str, linkage: str) -> Tensor:
    """Join the nearest two clusters of updates until ``clusters`` are left.

    Args:
        deltas: ``(clients, P)``. With the cosine metric, a zero update has distance 1 to all.
        clusters: Number of clusters. If there are fewer clients, each client forms a cluster.
        metric: cosine, euclidean or manhattan.
        linkage: Distance between clusters: the average, the largest (complete) or the smallest
            (single) distance between their members.

    Returns:
        Cluster of each client, ``(clients,)`` int64.
    """
    if len(deltas) <= clusters:
        return torch.arange(len(deltas))
    distances = pairwise_distances(deltas.numpy(), metric=metric)
    tree = AgglomerativeClustering(clusters, metric="precomputed", linkage=linkage)
    return torch.from_numpy(tree.fit_predict(distances)).long()
