"""IFCA: each client trains the adapter that fits it best, and so finds its cluster (Ghosh et al. 2020, arXiv 2006.04088)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack
from fedmerge_peft.strategies.clustering import Clustering, means
from fedmerge_peft.training.plan import Choose, Plan


class IFCA(Clustering):
    """Algorithm 1, with model averaging. All adapters go to every client, and one comes back:

    client:  j_i = argmin_j ℓ_i(Θ_j), then local training of Θ_{j_i}
    server:  Θ_j ← Θ_j − Σ_{i: j_i = j} n_i δ_i / Σ_{i: j_i = j} n_i

    A cluster that nobody chose stays as it is. A client is served with what it chose when it was last asked.

    IFCA depends on its start, and LoRA makes that worse: as long as B = 0, adapters differ by their random heads alone, so the
    first choice says little about the client. Where there is no head, all losses are equal and the first choice is drawn at
    random. An adapter that is ahead early may win all clients: the warnings tell which stand unused; another seed may help.
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
        clients, deltas, sizes = stack(replies)
        for reply in replies:
            self.clusters[reply.client] = reply.choice
        self.soup.rows = self.soup.rows - means(
            self.aggregator.clip(deltas),
            self.clusters[clients],
            sizes,
            len(self.soup),
            self.aggregator,
        )
