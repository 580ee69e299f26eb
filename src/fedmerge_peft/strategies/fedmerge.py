"""FedMerge: a soup of adapters, and for each client the weights to merge them with (arXiv 2504.06768)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.adapters.weights import MergingWeights
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import schema
from fedmerge_peft.strategies.base import Reply, Start, Strategy, stack
from fedmerge_peft.strategies.step import fedmerge_step


class FedMerge(Strategy):
    """θ_i = Σ_j softmax(W)_ij Θ_j; ``fedmerge_step`` learns Θ and W from the replies.

    ``start: warm`` keeps all adapters the same for a few rounds, which are FedAvg's then; after these the directions of the
    clients' updates set W, and the same round's soup step, with the new π, gives each group of clients its own adapter.
    """

    def __init__(self, recipe: schema.FedMerge, start: Start) -> None:
        self.recipe = recipe
        numbers = range(recipe.adapters) if recipe.start == "independent" else [0] * recipe.adapters
        self.soup = AdapterSoup(torch.stack([start.fresh_row(number) for number in numbers]), start.layout, start.shared)
        self.merging = MergingWeights.uniform(start.clients, recipe.adapters)
        head = start.layout.columns("head")
        if recipe.weights_columns == "head" and len(head) == 0:
            raise RecipeError(["strategy.weights_columns: this adapter has no head; use all, or name the head in lora.modules_to_save"])
        by_head = recipe.weights_columns == "head" or (recipe.weights_columns is None and recipe.rule == "paper" and len(head) > 0)
        self._columns = head if by_head else None
        self._warming = _Warming(start, recipe) if recipe.start == "warm" else None

    @property
    def weights(self) -> Tensor:
        return self.merging.softmax()

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack(replies)
        rule, weights_lr = self.recipe.rule, self.recipe.weights_lr
        if self._warming is not None:
            rule, weights_lr = "normalized", 0.0
            if self._warming.add(clients, deltas):
                self.merging.logits = self._warming.logits()
                self._warming = None
        self.soup.rows, self.merging.logits[clients] = fedmerge_step(
            self.soup.rows,
            self.merging.logits[clients],
            deltas,
            sizes,
            rule=rule,
            weights_lr=weights_lr,
            soup_lr=self.recipe.soup_lr,
            columns=self._columns,
        )

    def warnings(self) -> list[str]:
        if self.recipe.start == "identical":
            return ["all adapters started the same, so they stay the same and every client gets FedAvg's; use strategy.start=warm"]
        if self._warming is not None:
            done = f"clients are grouped after round {self.recipe.warm_rounds}, and this was round {self._warming.rounds}"
            return [f"{done}: so far this is FedAvg"]
        return super().warnings()


class _Warming:
    """The clients' updates over the rounds before the grouping."""

    def __init__(self, start: Start, recipe: schema.FedMerge) -> None:
        self.recipe = recipe
        self.seed = start.seed
        self.sums = torch.zeros(start.clients, start.layout.size)
        self.counts = torch.zeros(start.clients)
        self.rounds = 0

    def add(self, clients: Tensor, deltas: Tensor) -> bool:
        """Remember one round's updates; true when it was the last round before the grouping."""
        self.sums[clients] += deltas
        self.counts[clients] += 1
        self.rounds += 1
        return self.rounds == self.recipe.warm_rounds

    def logits(self) -> Tensor:
        """W after the grouping, ``(clients, d)``; clients that were never asked stay uniform."""
        from fedmerge_peft.strategies.grouping import group_by_direction

        seen = torch.nonzero(self.counts).flatten()
        groups = group_by_direction(self.sums[seen] / self.counts[seen, None], self.recipe.adapters, self.seed)
        logits = torch.zeros(len(self.counts), self.recipe.adapters)
        logits[seen, groups] = self.recipe.warm_logit
        return logits
