"""FedMerge: a soup of adapters, and for each client the weights to merge them with (arXiv 2504.06768)."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from fedmerge_peft.adapters.merging_weights import UNUSED_SHARE, MergingWeights
from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import strategies as recipes
from fedmerge_peft.strategies.balancing import balancing_shifts
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack
from fedmerge_peft.strategies.mean_updates import MeanUpdates
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.strategies.server_step import WEIGHTS_LR, weights_gradient, weights_move
from fedmerge_peft.strategies.similarity import group_by_direction, split_by_direction
from fedmerge_peft.util.stateful import Stateful

_ADAM_LR = 0.3
_ADAM_MEMORY = 0.9
"""Of the squared gradients, with ``rule: adam``; short, as a federation has tens of rounds."""


class FedMerge(Strategy):
    """θ_i = Σ_j π_ij Θ_j with π = softmax(W / T). A round's replies change W first, then Θ with the new π:

    W_i ← W_i − move(G_i),            G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩    (strategies/step.py has the rules)
    Θ_j ← Θ_j − η Σ_i q_ij δ_i,       q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i'

    ``start: warm`` keeps all adapters the same for a few rounds, which are FedAvg's then; after these the directions of the
    clients' updates set W, and the same round's soup step, with the new π, gives each group of clients its own adapter.
    """

    state_fields = ("server", "merging", "shifts", "steps", "_warming", "_reseeding", "rounds")
    learns_weights = True

    def __init__(self, recipe: recipes.FedMergeRecipe, context: StrategyContext) -> None:
        self.recipe = recipe
        self.seed = context.seed
        self.soup = AdapterSoup(_first_rows(recipe, context), context.layout, context.shared)
        self.server = ServerOptimizer(recipe, self.soup.rows)
        self.merging = MergingWeights.uniform(context.clients, recipe.adapters)
        self.shifts = torch.zeros(recipe.adapters, dtype=torch.float64)
        """What balance adds to the adapters' logits."""
        self.steps = _WeightsSteps(recipe, context)
        self._warming = MeanUpdates(context) if recipe.start == "warm" else None
        self._reseeding = (
            _Reseeding(recipe.reseed_after, recipe.adapters, context.seed)
            if recipe.reseed_after
            else None
        )
        self.rounds = 0

    @property
    def weights(self) -> Tensor:
        return self._softmax(self.merging.logits)

    def adapter(self, client: int) -> Tensor:
        return self.soup.merge(self._softmax(self.merging.logits[client]))

    def _softmax(self, logits: Tensor) -> Tensor:
        return torch.softmax(
            (logits / self.recipe.temperature).double() + self.shifts, dim=-1
        ).float()

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack(replies)
        deltas = self.aggregator.clip(deltas)
        shares = sizes / sizes.sum()
        before = self.weights[clients].double()
        if self._warming is None:
            gradient = weights_gradient(
                self.soup.rows, before, deltas, self.steps.columns, self.aggregator.lengths
            )
            gradient /= self.recipe.temperature
            self.merging.logits[clients] -= self.steps.move(clients, gradient, shares).float()
            if self._reseeding is not None:
                self._reseeding.look(
                    self.soup.rows, self.merging.logits, self.weights, clients, deltas
                )
        else:
            self._warming.add(clients, deltas)
            if self.rounds + 1 == self.recipe.warm_rounds:
                self._group(self._warming)
                self._warming = None
        self.rounds += 1
        left = 1 - self.rounds / self.recipe.balance_rounds if self.recipe.balance_rounds else 0.0
        self.shifts = (
            left * balancing_shifts(self.merging.logits / self.recipe.temperature)
            if left > 0
            else torch.zeros_like(self.shifts)
        )
        chain = self.recipe.rule == "gradient"
        gradient = self.aggregator.combine(
            deltas, before if chain else self.weights[clients], sizes, normalize=not chain
        )
        self.soup.rows = self.server.step(self.soup.rows, gradient)

    def _group(self, updates: MeanUpdates) -> None:
        """Set W by the directions of the clients' mean updates; clients that were never asked stay uniform."""
        means = updates.means()
        ones = torch.ones(len(means), 1)
        centre = (
            self.aggregator.combine(means, ones, ones[:, 0])
            if self.aggregator.recipe.defends
            else None
        )
        groups = group_by_direction(
            means, self.recipe.adapters, self.seed, self.recipe.groups, centre
        )
        own, others = self.recipe.warm_weight, self.recipe.adapters - 1
        if others:  # the logit beside zeros that softmax(W / T) turns into this weight
            self.merging.logits[updates.clients, groups] = self.recipe.temperature * math.log(
                own * others / (1 - own)
            )

    def warnings(self) -> list[str]:
        if self.recipe.start == "identical":
            return [
                "all adapters started the same, so they stay the same and every client gets FedAvg's; use strategy.start=warm"
            ]
        if self._warming is not None:
            done = f"clients are grouped after round {self.recipe.warm_rounds}, and this was round {self.rounds}"
            return [f"{done}: so far this is FedAvg"]
        return super().warnings()


def _first_rows(recipe: recipes.FedMergeRecipe, context: StrategyContext) -> Tensor:
    """Θ before the first round, ``(d, P)``."""
    if recipe.start == "independent":
        return torch.stack([context.fresh_row(number) for number in range(recipe.adapters)])
    rows = context.fresh_row(0).repeat(recipe.adapters, 1)
    if recipe.start == "noise":
        generator = torch.Generator().manual_seed(context.seed)
        rows += recipe.start_noise * torch.randn(rows.shape, generator=generator)
    return rows


class _WeightsSteps(Stateful):
    """How the logits step from G, and what the steps remember of earlier rounds, ``(clients, d)``."""

    state_fields = ("average", "squares", "rounds")

    def __init__(self, recipe: recipes.FedMergeRecipe, context: StrategyContext) -> None:
        self.recipe = recipe
        head = context.layout.columns("head")
        if recipe.weights_columns == "head" and len(head) == 0:
            raise RecipeError(
                [
                    "strategy.weights_columns: this adapter has no head; use all, or name the head in lora.modules_to_save"
                ]
            )
        by_head = recipe.weights_columns == "head" or (
            recipe.weights_columns is None and recipe.rule == "paper" and len(head) > 0
        )
        self.columns = head if by_head else None
        """Which of the P columns the inner product in G runs over; None for all."""
        default = _ADAM_LR if recipe.rule == "adam" else WEIGHTS_LR[recipe.rule]
        self.lr = default if recipe.weights_lr is None else recipe.weights_lr
        self.average = torch.zeros(context.clients, recipe.adapters, dtype=torch.float64)
        self.squares = torch.zeros_like(self.average)
        self.rounds = torch.zeros(context.clients, dtype=torch.int64)

    def move(self, clients: Tensor, gradient: Tensor, shares: Tensor) -> Tensor:
        """What to take from these clients' logits, ``(k, d)``; G enters as an exponential average over the rounds a client replied in."""
        memory = self.recipe.weights_memory
        self.rounds[clients] += 1
        self.average[clients] = memory * self.average[clients] + (1 - memory) * gradient
        unbiased = self.average[clients] / (1 - memory ** self.rounds[clients, None].double())
        if self.recipe.rule != "adam":
            return weights_move(self.recipe.rule, unbiased, shares, self.lr)
        self.squares[clients] = (
            _ADAM_MEMORY * self.squares[clients] + (1 - _ADAM_MEMORY) * gradient.square()
        )
        root = (
            self.squares[clients] / (1 - _ADAM_MEMORY ** self.rounds[clients, None].double())
        ).sqrt()
        return self.lr * torch.where(
            root > 0, unbiased / root.clamp_min(torch.finfo(torch.float64).tiny), 0.0
        )


class _Reseeding(Stateful):
    """Gives an adapter that nobody uses to part of the clients of the most used one.

    Those clients are split in two by the directions of their updates (as clustered federated learning splits a cluster, Sattler
    et al. 2020, arXiv 1910.01991); the idle adapter becomes a copy of theirs, and the smaller part moves to it.
    """

    state_fields = ("idle",)

    def __init__(self, patience: int, adapters: int, seed: int) -> None:
        self.patience = patience
        self.seed = seed
        self.idle = torch.zeros(adapters, dtype=torch.int64)
        """For how many rounds each adapter has stood unused."""

    def look(
        self, rows: Tensor, logits: Tensor, weights: Tensor, clients: Tensor, deltas: Tensor
    ) -> None:
        """Reseed at most one adapter, in place, before the round's soup step."""
        mass = weights.mean(dim=0)
        unused = mass < UNUSED_SHARE / len(mass)
        self.idle = torch.where(unused, self.idle + 1, 0)
        if int(self.idle.max()) < self.patience:
            return
        free, busy = int(self.idle.argmax()), int(mass.argmax())
        members = torch.nonzero(weights[clients].argmax(dim=1) == busy).flatten()
        if len(members) < 2:
            return
        halves = split_by_direction(deltas[members], self.seed)
        movers = clients[members[halves == int(halves.sum() * 2 < len(halves))]]
        rows[free] = rows[busy]
        logits[movers[:, None], [free, busy]] = logits[movers[:, None], [busy, free]]
        self.idle[free] = 0
