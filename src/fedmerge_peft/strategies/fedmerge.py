"""FedMerge: a soup of adapters, merged with learned weights for each client (arXiv 2504.06768)."""

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
from fedmerge_peft.strategies.base import Reply, Strategy, StrategyContext, stack_replies
from fedmerge_peft.strategies.mean_updates import MeanUpdates
from fedmerge_peft.strategies.server_optimizer import ServerOptimizer
from fedmerge_peft.strategies.server_step import WEIGHTS_LR, logits_step, weights_gradient
from fedmerge_peft.strategies.similarity import group_by_direction, split_by_direction
from fedmerge_peft.util.stateful import Stateful

_ADAM_LR = 0.3
_ADAM_DECAY = 0.9
"""Decay of the squared gradients with ``rule: adam``. It is low because a federation has only tens
of rounds."""


class FedMerge(Strategy):
    """θ_i = Σ_j π_ij Θ_j with π = softmax(W / T).

    Each round updates W first, then Θ with the new π:

    W_i ← W_i − step(G_i),            G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩
    Θ_j ← Θ_j − η Σ_i q_ij δ_i,       q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i'

    ``server_step.py`` defines the step for each rule.

    With ``start: warm``, all adapters stay equal for a few rounds, which then equal FedAvg. After
    these rounds the directions of the clients' updates determine W. The soup step of the same round
    uses the new π and gives each group of clients its own adapter.
    """

    state_fields = ("server", "merging", "shifts", "steps", "_warming", "_reseeding", "rounds")
    learns_weights = True

    def __init__(self, recipe: recipes.FedMergeRecipe, context: StrategyContext) -> None:
        self.recipe = recipe
        self.seed = context.seed
        self.soup = AdapterSoup(_initial_rows(recipe, context), context.layout, context.shared)
        self.server = ServerOptimizer(recipe, self.soup.rows)
        self.merging = MergingWeights.uniform(context.clients, recipe.adapters)
        self.shifts = torch.zeros(recipe.adapters, dtype=torch.float64)
        """Balancing shifts of the adapters' logits, ``(d,)`` float64."""
        self.steps = _LogitSteps(recipe, context)
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
        if self._warming is not None:  # all rows are equal; FedAvg's adapter, bit for bit
            return self.soup.rows[0].clone()
        return self.soup.merge(self._softmax(self.merging.logits[client]))

    def _softmax(self, logits: Tensor) -> Tensor:
        return torch.softmax(
            (logits / self.recipe.temperature).double() + self.shifts, dim=-1
        ).float()

    def update(self, replies: Iterable[Reply]) -> None:
        clients, deltas, sizes = stack_replies(replies)
        deltas = self.aggregator.clip(deltas)
        shares = sizes / sizes.sum()
        before = self.weights[clients].double()
        if self._warming is None:
            gradient = weights_gradient(
                self.soup.rows, before, deltas, self.steps.columns, self.aggregator.update_norms
            )
            gradient /= self.recipe.temperature
            self.merging.logits[clients] -= self.steps.compute(clients, gradient, shares).float()
            if self._reseeding is not None:
                self._reseeding.apply(
                    self.soup.rows, self.merging.logits, self.weights, clients, deltas
                )
        else:
            self._warming.add(clients, deltas)
            if self.rounds + 1 == self.recipe.warm_rounds:
                self._group(self._warming)
                self._warming = None
        self.rounds += 1
        balance = (
            1 - self.rounds / self.recipe.balance_rounds if self.recipe.balance_rounds else 0.0
        )
        self.shifts = (
            balance * balancing_shifts(self.merging.logits / self.recipe.temperature)
            if balance > 0
            else torch.zeros_like(self.shifts)
        )
        self.soup.rows = self.server.step(
            self.soup.rows, self._soup_gradient(clients, before, deltas, sizes)
        )

    def _soup_gradient(
        self, clients: Tensor, before: Tensor, deltas: Tensor, sizes: Tensor
    ) -> Tensor:
        """Combine the updates ``(k, P)`` of these clients to the gradient of Θ, ``(d, P)``.

        While warming, all rows have one gradient, that of FedAvg; the chain rule divides it by d.

        Args:
            clients: Client indices, ``(k,)``.
            before: π of these clients when they trained, ``(k, d)`` float64.
            deltas: δ, ``(k, P)``.
            sizes: n, ``(k,)``.
        """
        chain_rule = self.recipe.rule == "gradient"
        if self._warming is not None:
            common = self.aggregator.combine(deltas, torch.ones(len(sizes), 1), sizes)
            return (common / len(self.soup) if chain_rule else common).expand_as(self.soup.rows)
        return self.aggregator.combine(
            deltas, before if chain_rule else self.weights[clients], sizes, normalize=not chain_rule
        )

    def _group(self, updates: MeanUpdates) -> None:
        """Set W according to the directions of the clients' mean updates.

        Clients that have not taken part yet keep uniform weights.
        """
        means = updates.means()
        ones = torch.ones(len(means), 1)
        center = (
            self.aggregator.combine(means, ones, ones[:, 0])
            if self.aggregator.recipe.defends
            else None
        )
        groups = group_by_direction(
            means, self.recipe.adapters, self.seed, self.recipe.groups, center
        )
        own, others = self.recipe.warm_weight, self.recipe.adapters - 1
        if others:  # all other logits are zero, so softmax(W / T) gives this weight
            self.merging.logits[updates.clients, groups] = self.recipe.temperature * math.log(
                own * others / (1 - own)
            )

    def warnings(self) -> list[str]:
        if self.recipe.start == "identical":
            return [
                "all adapters start equal and stay equal, so every client is served FedAvg's "
                "adapter; use strategy.start=warm"
            ]
        if self._warming is not None:
            return [
                f"until clients are grouped after round {self.recipe.warm_rounds}, "
                f"fedmerge equals FedAvg; completed rounds: {self.rounds}"
            ]
        return super().warnings()


def _initial_rows(recipe: recipes.FedMergeRecipe, context: StrategyContext) -> Tensor:
    """Return Θ before the first round, ``(d, P)``."""
    if recipe.start == "independent":
        return torch.stack([context.fresh_row(number) for number in range(recipe.adapters)])
    rows = context.fresh_row(0).repeat(recipe.adapters, 1)
    if recipe.start == "noise":
        generator = torch.Generator().manual_seed(context.seed)
        rows += recipe.start_noise * torch.randn(rows.shape, generator=generator)
    return rows


class _LogitSteps(Stateful):
    """Steps of the logits along G, with running moments of G, ``(clients, d)`` each."""

    state_fields = ("average", "squares", "rounds")

    def __init__(self, recipe: recipes.FedMergeRecipe, context: StrategyContext) -> None:
        self.recipe = recipe
        head = context.layout.columns("head")
        if recipe.weights_columns == "head" and len(head) == 0:
            raise RecipeError(
                [
                    "strategy.weights_columns: this adapter has no head; "
                    "use all, or name the head in lora.modules_to_save"
                ]
            )
        by_head = recipe.weights_columns == "head" or (
            recipe.weights_columns is None and recipe.rule == "paper" and len(head) > 0
        )
        self.columns = head if by_head else None
        """Indices of the columns that enter the inner product in G; None for all P columns."""
        default = _ADAM_LR if recipe.rule == "adam" else WEIGHTS_LR[recipe.rule]
        self.lr = default if recipe.weights_lr is None else recipe.weights_lr
        self.average = torch.zeros(context.clients, recipe.adapters, dtype=torch.float64)
        self.squares = torch.zeros_like(self.average)
        self.rounds = torch.zeros(context.clients, dtype=torch.int64)

    def compute(self, clients: Tensor, gradient: Tensor, shares: Tensor) -> Tensor:
        """Compute the steps to subtract from these clients' logits, ``(k, d)`` float64.

        The steps use an exponential average of G over the rounds in which a client replied.

        Args:
            clients: Client indices, ``(k,)``.
            gradient: G, ``(k, d)`` float64.
            shares: ρ, ``(k,)`` float64.
        """
        memory = self.recipe.weights_memory
        self.rounds[clients] += 1
        self.average[clients] = memory * self.average[clients] + (1 - memory) * gradient
        unbiased = self.average[clients] / (1 - memory ** self.rounds[clients, None].double())
        if self.recipe.rule != "adam":
            return logits_step(self.recipe.rule, unbiased, shares, self.lr)
        self.squares[clients] = (
            _ADAM_DECAY * self.squares[clients] + (1 - _ADAM_DECAY) * gradient.square()
        )
        root = (
            self.squares[clients] / (1 - _ADAM_DECAY ** self.rounds[clients, None].double())
        ).sqrt()
        return self.lr * torch.where(
            root > 0, unbiased / root.clamp_min(torch.finfo(torch.float64).tiny), 0.0
        )


class _Reseeding(Stateful):
    """Reassignment of an unused adapter to some clients of the most used adapter.

    These clients are split in two by the directions of their updates, as clustered federated
    learning splits a cluster (Sattler et al. 2020, arXiv 1910.01991). The unused adapter becomes a
    copy of the most used one, and the smaller half of the clients moves to it.
    """

    state_fields = ("idle",)

    def __init__(self, patience: int, adapters: int, seed: int) -> None:
        self.patience = patience
        self.seed = seed
        self.idle = torch.zeros(adapters, dtype=torch.int64)
        """Number of consecutive rounds in which each adapter was unused, ``(d,)`` int64."""

    def apply(
        self, rows: Tensor, logits: Tensor, weights: Tensor, clients: Tensor, deltas: Tensor
    ) -> None:
        """Reassign at most one adapter, in place, before the round's soup step.

        Args:
            rows: Θ, ``(d, P)``.
            logits: W, ``(m, d)``.
            weights: π, ``(m, d)``.
            clients: Clients that replied, ``(k,)``.
            deltas: δ, ``(k, P)``.
        """
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
