"""FedAvg with local fine-tuning: the simplest form of personalization."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import mean_delta
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import Plan, Train


class FedAvgFinetuned(OneHotStrategy):
    """FedAvg, θ ← θ − η Σ_i ρ_i δ_i, with each client served its own fine-tuned θ.

    Client i is served θ_i = θ(sent) − δ_i of the last round in which it took part. Before its first
    round it is served θ. Rows of the soup: θ, then θ_1 to θ_m.
    """

    state_fields = (*OneHotStrategy.state_fields, "server")
    trains_what_it_serves = False

    def __init__(self, recipe: recipes.FedAvgFinetunedRecipe, context: StrategyContext) -> None:
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(1 + context.clients, 1), context.layout, context.shared
        )
        self.server = ServerOptimizer(recipe, self.soup.rows[:1])
        self.assigned = torch.zeros(context.clients, dtype=torch.int64)

    def plan(self, client: int) -> Plan:
        return Train(self.soup.rows[0].clone())

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        for reply in replies:
            self.soup.rows[1 + reply.client] = self.soup.rows[0] - reply.delta
            self.assigned[reply.client] = 1 + reply.client
        self.soup.rows[:1] = self.server.step(
            self.soup.rows[:1], mean_delta(replies, self.aggregator)[None]
        )
