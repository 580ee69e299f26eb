"""FedAvg with local finetuning: the simplest form of personalization."""

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
    """FedAvg, θ ← θ − η Σ_i ρ_i δ_i, that serves each client its own finetuned adapter θ_i.

    Without ``fedavg_rounds``, all rounds aggregate, and client i is served θ_i = θ(sent) − δ_i of
    the last round in which it took part. This requires no further training, but θ_i does not
    contain that round's aggregation. Before its first round a client is served θ.

    With ``fedavg_rounds`` = T, the first T rounds are FedAvg, and every client is served θ. From
    then on θ is fixed, and clients finetune in each further round:

        θ_i ← ``passes`` passes of local training on ℓ_i(θ_i)

    A client starts from θ_i = θ. If it takes part in R rounds of finetuning, it therefore trains
    for R · ``passes`` times ``training.epochs`` (or ``training.steps``), starting from θ. In these
    rounds, a client receives θ once and returns nothing. A client that takes part in none of them
    is served θ.

    The rows of the soup are θ, then θ_1 to θ_m.
    """

    adapters_per_client = 1
    state_fields = (*OneHotStrategy.state_fields, "server", "rounds")

    def __init__(self, recipe: recipes.FedAvgFinetunedRecipe, context: StrategyContext) -> None:
        self.fedavg_rounds = recipe.fedavg_rounds
        self.phases = (None,) * recipe.passes
        self.trains_what_it_serves = recipe.fedavg_rounds is not None
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(1 + context.clients, 1), context.layout, context.shared
        )
        self.server = ServerOptimizer(recipe, self.soup.rows[:1])
        self.assigned = torch.zeros(context.clients, dtype=torch.int64)
        self.rounds = 0

    @property
    def finetuning(self) -> bool:
        """True if clients finetune in the next round."""
        return self.fedavg_rounds is not None and self.rounds >= self.fedavg_rounds

    def plan(self, client: int) -> Plan:
        if self.finetuning:
            return Train(self.adapter(client), phases=self.phases)
        return Train(self.soup.rows[0].clone())

    def update(self, replies: Iterable[Reply]) -> None:
        replies = list(replies)
        if self.finetuning or self.fedavg_rounds is None:
            for reply in replies:
                sent = self.adapter(reply.client) if self.finetuning else self.soup.rows[0]
                self.soup.rows[1 + reply.client] = sent - reply.delta
                self.assigned[reply.client] = 1 + reply.client
        if not self.finetuning:
            self.soup.rows[:1] = self.server.step(
                self.soup.rows[:1], mean_delta(replies, self.aggregator)[None]
            )
        self.rounds += 1

    def traffic(self, client: int) -> tuple[int, int]:
        size = self.soup.layout.size
        if self.finetuning:
            return (0 if self.assigned[client] else size), 0
        return size, size

    def warnings(self) -> list[str]:
        if self.fedavg_rounds is None or self.finetuning:
            return super().warnings()
        return [
            f"until clients finetune after round {self.fedavg_rounds}, fedavg_ft equals FedAvg; "
            f"completed rounds: {self.rounds}"
        ]
