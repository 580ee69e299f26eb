"""FeSEM: k-means of trained adapters, a step of it each round (Long et al. 2023, arXiv 2108.08647; Xie et al. 2020, arXiv 2005.01026)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, Start, stack
from fedmerge_peft.strategies.clusters import Clustering, means, members
from fedmerge_peft.strategies.grouping import k_means


class FeSEM(Clustering):
    """With θ_i the adapter that a client made of its cluster's centre by local training:

    E:  j_i = argmin_j ‖θ_i − Θ_j‖₂
    M:  Θ_j ← mean of θ_i over the clients with j_i = j, each counting the same

    In the first round all clients start from one adapter, and k-means finds clusters and centres. The server does it all, so one
    adapter travels each way. A centre that no reply is nearest to stays as it is. Training moves a client less than centres are
    apart before long, so clusters seldom change after the first rounds.
    """

    def __init__(self, recipe: recipes.FeSEM, start: Start) -> None:
        super().__init__(start.fresh_row(0).repeat(recipe.adapters, 1), start)
        self.seed = start.seed

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, _ = stack(replies)
        trained = self.soup.merge(self.weights[clients]) - deltas
        count = len(self.soup)
        if bool((self.clusters < 0).all()):
            # from one start, distances between δ are those between θ
            nearest = k_means(deltas.double() - deltas.double().mean(dim=0), count, self.seed)
        else:  # directly: by inner products, small distances between long rows drown in rounding
            nearest = torch.cdist(trained, self.soup.rows, compute_mode="donot_use_mm_for_euclid_dist").argmin(dim=1)
        self.clusters[clients] = nearest
        found = members(nearest, count).any(dim=0)[:, None]
        self.soup.rows = torch.where(found, means(trained, nearest, torch.ones(len(clients)), count), self.soup.rows)
