"""FeSEM: k-means of trained adapters, one step in each round.

Sources: Long et al. 2023, arXiv 2108.08647; Xie et al. 2020, arXiv 2005.01026.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack_replies
from fedmerge_peft.strategies.clustering import ServerClustering, cluster_means, membership
from fedmerge_peft.strategies.similarity import coordinates, inner_products, k_means


class FeSEM(ServerClustering):
    """k-means over θ_i, the adapter that client i trained from the center of its cluster:

    E:  j_i = argmin_j ‖θ_i − Θ_j‖₂
    M:  Θ_j ← mean of θ_i over the clients with j_i = j, with equal weights

    At first all clients train one adapter. As soon as enough clients have replied, the server
    computes the initial clusters and centers by k-means; θ_i is then the mean of the adapters that
    client i has trained so far. The server performs both steps E and M, so one adapter travels in
    each direction. A center does not change if it is not the nearest to any θ_i of the round. After
    a few rounds, training moves an adapter by less than the distance between centers, so clusters
    rarely change later.
    """

    def __init__(self, recipe: recipes.FeSEMRecipe, context: StrategyContext) -> None:
        super().__init__(recipe.adapters, context)
        self.seed = context.seed

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, _ = stack_replies(replies)
        deltas = self.aggregator.clip(deltas)
        count = len(self.soup)
        if self.unclustered is not None:
            self.unclustered.add(clients, deltas)
            if self.clients_needed():
                return
            clients, deltas = self.unclustered.clients, self.unclustered.means()
            self.unclustered = None
            # All clients start from the same adapter, so distances between δ equal those between θ.
            nearest = k_means(coordinates(inner_products(deltas)), count, self.seed)
            trained = self.soup.rows[0] - deltas
        else:
            known = self.assign_newcomers(clients, deltas)
            clients, deltas = clients[known], deltas[known]
            trained = self.soup.rows[self.clusters[clients]] - deltas
            # Distances from inner products would lose small differences of long rows to rounding.
            nearest = torch.cdist(
                trained, self.soup.rows, compute_mode="donot_use_mm_for_euclid_dist"
            ).argmin(dim=1)
        self.clusters[clients] = nearest
        has_replies = membership(nearest, count).any(dim=0)[:, None]
        self.soup.rows = torch.where(
            has_replies,
            cluster_means(trained, nearest, torch.ones(len(clients)), count, self.aggregator),
            self.soup.rows,
        )

    def warnings(self) -> list[str]:
        if needed := self.clients_needed():
            return [
                "until clients are clustered, all train the same adapter; "
                f"clients still needed: {needed}"
            ]
        return super().warnings()
