"""Ditto: a private adapter for each client, regularized toward a global one.

Source: Li et al. 2021, arXiv 2012.04221.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import mean_delta
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import InTurn, Plan, Train


class Ditto(OneHotStrategy):
    """FedAvg of a global adapter w, and a private adapter v_i for each client (algorithm 1):

        w ← w − η Σ_i ρ_i δ_i,    v_i ← local training on ℓ_i(v) + λ/2 ‖v − w‖²

    In the second step w is the global adapter as sent. w does not depend on the v_i. In the first
    round in which a client takes part, its v_i starts from w. Until then the client is served w.
    The rows of the soup are w, then v_1 to v_m. ``traffic`` counts w alone; across sites, v_i
    travels too.
    """

    adapters_per_client = 1
    state_fields = (*OneHotStrategy.state_fields, "server")

    def __init__(self, recipe: recipes.DittoRecipe, context: StrategyContext) -> None:
        self.regularization = recipe.regularization
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(1 + context.clients, 1), context.layout, context.shared
        )
        self.server = ServerOptimizer(recipe, self.soup.rows[:1])
        self.assigned = torch.zeros(context.clients, dtype=torch.int64)

    def plan(self, client: int) -> Plan:
        shared = self.soup.rows[0].clone()
        return InTurn(
            (
                Train(shared),
                Train(self.adapter(client), anchor=shared, proximal=self.regularization / 2),
            )
        )

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        for reply in replies:
            self.soup.rows[1 + reply.client] = self.adapter(reply.client) - reply.deltas[1]
            self.assigned[reply.client] = 1 + reply.client
        self.soup.rows[:1] = self.server.step(
            self.soup.rows[:1], mean_delta(replies, self.aggregator)[None]
        )
