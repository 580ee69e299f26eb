"""FedDPA: a global and a private LoRA, active at the same time.

Source: dual-personalizing adapters, Yang et al. 2024, arXiv 2403.19211.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.adapters.lora_factors import layer_factors
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import mean_delta
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.rank_halves import rank_halves
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import InTurn, Plan, Train


class FedDPA(OneHotStrategy):
    """One LoRA of rank r that contains a global and a private adapter, B A = B_g A_g + B_i A_i.

    The first half of the ranks is global, the second half is private. In each round a client trains
    (FedDPA-T in the paper):

        1. (B_g, A_g) and a global head, with B_i = 0. Their mean over the clients is the next
           global adapter.
        2. (B_i, A_i) and its private head, which stay at the client, with (B_g, A_g) as sent.

    The client is served B_g A_g + B_i A_i and its private head. The rows of the soup are the global
    adapter with B_i = 0, then one row for each client.

    Differences from the paper:

    - The paper's language models have no head. Here a private head starts from the global head. A
      client that has not taken part yet is served the global head.
    - Both halves have weight 1. The paper weights the private half by the similarity of each test
      input to the client's examples, or by one tuned number.
    - Parameters that are neither factor nor head, such as trained biases, belong to the global
      half.
    """

    adapters_per_client = 1
    state_fields = (*OneHotStrategy.state_fields, "server", "newcomers")

    def __init__(self, recipe: recipes.FedDPARecipe, context: StrategyContext) -> None:
        _, second = rank_halves(recipe.name, context.layout)
        self.head = torch.zeros(context.layout.size, dtype=torch.bool)
        self.head[context.layout.columns("head")] = True
        self.shared = ~second
        self.private = second | self.head
        rows = context.fresh_row(0).repeat(1 + context.clients, 1)
        for layer in layer_factors(context.layout):
            # B_i = 0 in the global row. On embeddings, PEFT initializes B at random.
            layer.split(rows[0])[1][:, layer.rank // 2 :] = 0
        self.soup = AdapterSoup(rows, context.layout, context.shared)
        self.server = ServerOptimizer(recipe, rows[:1])
        self.assigned = 1 + torch.arange(context.clients)
        self.newcomers = torch.ones(context.clients, dtype=torch.bool)

    def plan(self, client: int) -> Plan:
        shared, private = (
            Train(self.soup.rows[0].clone(), (self.shared,)),
            Train(self.adapter(client), (self.private,)),
        )
        return InTurn((shared, private))

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        rows = self.soup.rows
        rows[:1] = self.server.step(rows[:1], mean_delta(replies, self.aggregator)[None])
        for reply in replies:
            rows[1 + reply.client] -= reply.deltas[1]
            self.newcomers[reply.client] = False
        from_global = (~self.private).expand_as(rows[1:]) | (self.head & self.newcomers[:, None])
        rows[1:] = torch.where(from_global, rows[0], rows[1:])

    def traffic(self, client: int) -> tuple[int, int]:
        shared = int(self.shared.sum())
        return shared, shared
