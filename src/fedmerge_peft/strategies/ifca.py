"""IFCA: each client trains the adapter with the lowest loss on its examples.

Source: Ghosh et al. 2020, arXiv 2006.04088.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack_replies
from fedmerge_peft.strategies.clustering import Clustering, cluster_means
from fedmerge_peft.training.plan import Choose, Plan


class IFCA(Clustering):
    """Clustering by each client's choice (algorithm 1 with model averaging):

    client:  j_i = argmin_j ℓ_i(Θ_j), then local training of Θ_{j_i}
    server:  Θ_j ← Θ_j − Σ_{i: j_i = j} n_i δ_i / Σ_{i: j_i = j} n_i

    Each client is sent all adapters and returns one. An adapter that no client chose does not
    change. A client is served the adapter that it chose last.

    IFCA depends on its initialization, and LoRA increases this dependence. While B = 0, only the
    random heads of the adapters affect their losses, so the first choice is hardly informative.
    Without a head, all losses are equal and the first choice is random. An adapter with an early
    advantage may attract all clients. The warnings list unused adapters; another seed may help.
    """

    def __init__(self, recipe: recipes.IFCARecipe, context: StrategyContext) -> None:
        super().__init__(
            torch.stack([context.fresh_row(number) for number in range(recipe.adapters)]), context
        )

    def plan(self, client: int) -> Plan:
        return Choose(self.soup.rows)

    def traffic(self, client: int) -> tuple[int, int]:
        return len(self.soup) * self.soup.layout.size, self.soup.layout.size

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        clients, deltas, sizes = stack_replies(replies)
        for reply in replies:
            self.clusters[reply.client] = reply.choice
        self.soup.rows = self.soup.rows - cluster_means(
            self.aggregator.clip(deltas),
            self.clusters[clients],
            sizes,
            len(self.soup),
            self.aggregator,
        )
