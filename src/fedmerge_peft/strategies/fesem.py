"""FeSEM: k-means of trained adapters, a step of it each round (Long et al. 2023, arXiv 2108.08647; Xie et al. 2020, arXiv 2005.01026)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack
from fedmerge_peft.strategies.clustering import ServerClustering, means, members
from fedmerge_peft.strategies.similarity import inner_products, k_means


class FeSEM(ServerClustering):
    """With θ_i the adapter that a client made of its cluster's centre by local training:

    E:  j_i = argmin_j ‖θ_i − Θ_j‖₂
    M:  Θ_j ← mean of θ_i over the clients with j_i = j, each counting the same

    At first all clients train one adapter, and k-means of θ_i finds clusters and centres, as soon as there are enough clients. The
    server does it all, so one adapter travels each way. A centre that no reply is nearest to stays as it is. Training moves a client
    less than centres are apart before long, so clusters seldom change after the first rounds.
    """

    def __init__(self, recipe: recipes.FeSEMRecipe, context: StrategyContext) -> None:
        super().__init__(recipe.adapters, context)
        self.seed = context.seed

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, _ = stack(replies)
        deltas = self.aggregator.clip(deltas)
        count = len(self.soup)
        if self.unclustered is not None:
            self.unclustered.add(clients, deltas)
            if self.missing():
                return
            clients, deltas = self.unclustered.clients, self.unclustered.means()
            self.unclustered = None
            # from one start, distances between δ are those between θ
            nearest = k_means(inner_products(deltas), count, self.seed)
            trained = self.soup.rows[0] - deltas
        else:
            counts = self.place(clients, deltas)
            clients, deltas = clients[counts], deltas[counts]
            trained = self.soup.rows[self.clusters[clients]] - deltas
            # directly: by inner products, small distances between long rows drown in rounding
            nearest = torch.cdist(
                trained, self.soup.rows, compute_mode="donot_use_mm_for_euclid_dist"
            ).argmin(dim=1)
        self.clusters[clients] = nearest
        found = members(nearest, count).any(dim=0)[:, None]
        self.soup.rows = torch.where(
            found,
            means(trained, nearest, torch.ones(len(clients)), count, self.aggregator),
            self.soup.rows,
        )

    def warnings(self) -> list[str]:
        if missing := self.missing():
            return [
                f"clients are clustered when {missing} more have taken part: until then all train the same start"
            ]
        return super().warnings()
