"""FL+HC: FedAvg, then hierarchical clusters of the clients' updates, each with FedAvg of its own (Briggs et al. 2020, arXiv 2004.11791)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import pairwise_distances
from torch import Tensor

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack
from fedmerge_peft.strategies.clustering import ServerClustering, means


class FLHC(ServerClustering):
    """Algorithm 1. Up to and with round ``warm_rounds`` all clients train one adapter θ; then they are clustered once:

    before:      θ ← θ − Σ_i n_i δ_i / Σ_i n_i
    from there:  Θ_j ← Θ_j − Σ_{i in j} n_i δ_i / Σ_{i in j} n_i

    The round of the clustering is also the first round of the clusters' own FedAvg, as they start from the same θ; sums run over
    the clients that replied in a round, and a cluster of which none did stays as it is. The paper has all clients train for the
    clustering; here it sees the last update of each client that took part in a warm round. The paper cuts the tree at a distance;
    here the number of clusters is given, so that methods compare.
    """

    state_fields = (*ServerClustering.state_fields, "rounds")

    def __init__(self, recipe: recipes.FLHCRecipe, context: StrategyContext) -> None:
        super().__init__(recipe.adapters, context)
        self.recipe = recipe
        self.rounds = 0

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack(replies)
        deltas = self.aggregator.clip(deltas)
        rows, count = self.soup.rows, len(self.soup)
        self.rounds += 1
        if self.unclustered is not None:
            self.unclustered.put(clients, deltas)
            if self.rounds < self.recipe.warm_rounds or self.missing():
                self.soup.rows = rows - means(
                    deltas, torch.zeros_like(clients), sizes, 1, self.aggregator
                )
                return
            found = hierarchy(
                self.unclustered.means(), count, self.recipe.metric, self.recipe.linkage
            )
            self.clusters[self.unclustered.clients] = found
            self.unclustered = None
        counts = self.place(clients, deltas)
        self.soup.rows = rows - means(
            deltas[counts], self.clusters[clients[counts]], sizes[counts], count, self.aggregator
        )

    def warnings(self) -> list[str]:
        if self.rounds < self.recipe.warm_rounds:
            done = f"clients are clustered after round {self.recipe.warm_rounds}, and this was round {self.rounds}"
            return [f"{done}: so far this is FedAvg"]
        if missing := self.missing():
            return [
                f"clients are clustered when {missing} more have taken part: so far this is FedAvg"
            ]
        return super().warnings()


def hierarchy(deltas: Tensor, groups: int, metric: str, linkage: str) -> Tensor:
    """Agglomerative clusters of the updates, ``(clients,)`` int64: the nearest two are joined until ``groups`` are left.

    Args:
        deltas: ``(clients, P)``. With cosine, an update that is zero is at distance 1 from all.
        groups: How many clusters; with fewer clients, each is its own.
        metric: cosine, euclidean or manhattan.
        linkage: Distance between clusters: the average, the largest (complete) or the smallest (single) of their members'.
    """
    if len(deltas) <= groups:
        return torch.arange(len(deltas))
    distances = pairwise_distances(deltas.numpy(), metric=metric)
    tree = AgglomerativeClustering(groups, metric="precomputed", linkage=linkage)
    return torch.from_numpy(tree.fit_predict(distances)).long()
