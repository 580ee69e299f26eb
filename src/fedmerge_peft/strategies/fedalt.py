"""FedALT: a private LoRA for each client, next to a frozen mean of the other clients' LoRAs.

Source: Bian et al. 2026, arXiv 2503.11880.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.rank_halves import rank_halves
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import Plan, Train


class FedALT(OneHotStrategy):
    """One LoRA of rank r that contains two adapters, B A = B_R A_R + B_i A_i.

    The first half of the ranks is (B_R, A_R), for the rest of the world. The second half is
    (B_i, A_i), the client's own. In each round a client continues to train (B_i, A_i) with
    (B_R, A_R) frozen. For each client i, the server then averages the adapters of the n other
    clients that have taken part at least once:

        A_R ← 1/n Σ_{k ≠ i} A_k,    B_R ← 1/n Σ_{k ≠ i} B_k

    The server optimizer performs these steps, with the gradient R_i − mean for R_i = (A_R, B_R) of
    client i. Its default, η = 1 without momentum, replaces R_i by the mean.

    The server never overwrites the client's own half. A client returns its own half and is sent the
    other half. Heads and all other parameters that are not factors train with the client's own
    half, and stay at the client. Before its first round, a client has the initial heads and other
    parameters, and B_i A_i = 0. The soup has one row for each client.

    Differences from the paper:

    - In the paper, a gate computes the weights of both adapters for each token. A LoRA adapter has
      no gate, so here both adapters have the same weight.
    - The paper's language models have no head.
    - In the paper, all clients take part in each round. Here a client that pauses enters the means
      with the last adapter that it returned.
    """

    adapters_per_client = 1
    state_fields = (*OneHotStrategy.state_fields, "took_part", "server")
    averages = False

    def __init__(self, recipe: recipes.FedALTRecipe, context: StrategyContext) -> None:
        self.rest, self.own = rank_halves(recipe.name, context.layout)
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(context.clients, 1), context.layout, context.shared
        )
        self.server = ServerOptimizer(recipe, self.soup.rows[:, self.rest])
        self.assigned = torch.arange(context.clients)
        self.took_part = torch.zeros(context.clients, dtype=torch.bool)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(~self.rest,))

    def update(self, replies: Iterable[Reply]) -> None:
        rows = self.soup.rows
        for reply in replies:
            rows[reply.client, ~self.rest] -= reply.delta[~self.rest]
            self.took_part[reply.client] = True
        known = self.took_part[:, None]  # (m, 1)
        returned = torch.where(known, rows[:, self.own].double(), 0.0)  # (m, P_own)
        others = known.sum() - known.long()
        means = (returned.sum(dim=0) - returned) / others.clamp_min(1)
        rest = rows[:, self.rest]
        gradient = torch.where(others > 0, rest - means.float(), 0.0)
        rows[:, self.rest] = self.server.step(rest, gradient)

    def traffic(self, client: int) -> tuple[int, int]:
        return int(self.rest.sum()), int(self.own.sum())
