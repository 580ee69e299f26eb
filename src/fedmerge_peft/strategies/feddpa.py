"""FedDPA: a global and a private LoRA at once (dual-personalising adapters, Yang et al. 2024, arXiv 2403.19211)."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from fedmerge_peft.adapters.lora_factors import layer_factors, rank_mask
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.assigned import Assigned
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import mean_delta
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.training.plan import InTurn, Plan, Train


class FedDPA(Assigned):
    """One slot of rank r carries both: B A = B_g A_g + B_i A_i, with the first half of the ranks global and the second private.

    Each round a client trains (the paper's FedDPA-T)

        1. (B_g, A_g) and a global head, with B_i = 0: the mean of these over clients is the next global adapter;
        2. (B_i, A_i) and its private head, with (B_g, A_g) as it was sent: these stay at the client

    and is served with B_g A_g + B_i A_i and its private head. Rows of the soup: the global adapter, its private half switched off,
    then one for each client.

    Where this differs from the paper: its language models have no head, so there is none to share or to keep. Here a private head starts
    from the global one, and a client that has not taken part yet is served with the global one. Both halves count 1; the paper also weighs
    the private half for each test input, by its likeness to the client's examples, and takes one tuned number otherwise. What is neither
    factor nor head, such as trained biases, goes with the global half.
    """

    state_fields = (*Assigned.state_fields, "server", "newcomers")

    def __init__(self, recipe: recipes.FedDPARecipe, context: StrategyContext) -> None:
        try:
            odd = [
                f"{each.module} has rank {each.rank}"
                for each in layer_factors(context.layout)
                if each.rank % 2
            ]
            halves = [
                rank_mask(context.layout, half)
                for half in (lambda rank: slice(rank // 2), lambda rank: slice(rank // 2, None))
            ]
        except ValueError as error:
            raise RecipeError(
                [
                    f"strategy.name: feddpa cannot halve this adapter: {error}; use plain LoRA, with lora.merge: factor"
                ]
            ) from error
        if odd:
            raise RecipeError(
                [
                    f"lora.r: feddpa gives half of the ranks to each client, and {odd[0]}; use an even rank"
                ]
            )
        self.head = torch.zeros(context.layout.size, dtype=torch.bool)
        self.head[context.layout.columns("head")] = True
        self.travels = ~halves[1]
        self.private = halves[1] | self.head
        rows = context.fresh_row(0).repeat(1 + context.clients, 1)
        for each in layer_factors(context.layout):
            each.split(rows[0])[1][:, each.rank // 2 :] = (
                0  # B_i, which on embeddings does not start at zero
            )
        self.soup = AdapterSoup(rows, context.layout, context.shared)
        self.server = ServerOptimizer(recipe, rows[:1])
        self.assigned = 1 + torch.arange(context.clients)
        self.newcomers = torch.ones(context.clients, dtype=torch.bool)

    def plan(self, client: int) -> Plan:
        shared, own = (
            Train(self.soup.rows[0].clone(), (self.travels,)),
            Train(self.adapter(client), (self.private,)),
        )
        return InTurn((shared, own))

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        rows = self.soup.rows
        rows[:1] = self.server.step(rows[:1], mean_delta(replies, self.aggregator)[None])
        for reply in replies:
            rows[1 + reply.client] -= reply.deltas[1]
            self.newcomers[reply.client] = False
        given = (~self.private).expand_as(rows[1:]) | (self.head & self.newcomers[:, None])
        rows[1:] = torch.where(given, rows[0], rows[1:])

    def traffic(self, client: int) -> tuple[int, int]:
        travels = int(self.travels.sum())
        return travels, travels
