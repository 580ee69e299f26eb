"""FeMAM: a client's model is the sum of a global model, models of clusters, and a personal model.

Source: Chen et al. 2026, arXiv 2405.16472.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.adapters.soup import AdapterSoup
from fedmerge_peft.recipe.personal_strategies import FeMAMRecipe
from fedmerge_peft.strategies.base import Reply, StrategyContext, stack_replies
from fedmerge_peft.strategies.clustering import cluster_means
from fedmerge_peft.strategies.one_hot import OneHotStrategy
from fedmerge_peft.strategies.rank_halves import rank_parts
from fedmerge_peft.strategies.similarity import k_means
from fedmerge_peft.training.plan import Plan, Train


class FeMAM(OneHotStrategy):
    """Sum θ_i = Σ_l Θ_l,c_l(i) of at most one model of each of L levels, which train in sequence.

    Level 1 has one model for all clients, level L has one for each client, and a level between them
    has one for each of k clusters. Only the current level trains, on the loss of the whole sum, so
    it fits the residual of the earlier levels. Let t_i = θ_i − Σ_{l' < l} Θ_l',c_l'(i) be client
    i's model of level l after its training. A round of level l computes

        l = 1:       Θ_1 ← Σ_i n_i t_i / Σ_i n_i
        1 < l < L:   c(i) by k-means of t_i,   Θ_l,j ← Σ_{c(i) = j} n_i t_i / Σ_{c(i) = j} n_i
        l = L:       Θ_L,i ← t_i, which never leaves the client

    At the end of a level between 1 and L, a client drops its model of this level unless its
    validation loss is lower than at the start of the level.

    The levels share one LoRA of rank r: level l has its own part of the ranks, so that
    B A = Σ_l B_l A_l. Each level also adds to the head and all other parameters. k-means compares
    the directions of the heads, or of the levels' whole models if there is no head. The soup has
    one row for each client: the initial adapter plus the client's levels. A client that pauses
    keeps its model of the current level, except in level 1. A client with fewer than two validation
    losses from the rounds of a level keeps its model of this level.

    Differences from the paper:

    - In the paper, the outputs of whole models are added. Here the updates of the weights are
      added, so that a client is served one adapter. For the head, both are the same.
    - In the authors' program, a level starts from the trained model of level 1, ends when the
      validation loss is constant, and is kept if the means of the validation loss over 50 rounds
      decrease. Here a level starts from zero, has a fixed number of rounds, and is kept or dropped
      by the losses before the client's first and last round of the level. The last level is not
      dropped, because it ends with the run.
    - The authors' local training has a proximal term of 0.01; set it with ``training.proximal``.
    """

    adapters_per_client = 2
    state_fields = (
        *OneHotStrategy.state_fields,
        "before",
        "first_loss",
        "last_loss",
        "last_round",
        "rounds",
    )

    def __init__(self, recipe: FeMAMRecipe, context: StrategyContext) -> None:
        self.recipe = recipe
        parts = rank_parts(recipe.name, context.layout, recipe.levels)
        others = ~torch.stack(parts).any(dim=0)
        self.masks = [part | others for part in parts]
        """Columns of each level, ``(P,)`` bool: its ranks, the head and all other parameters."""
        head = torch.zeros_like(others)
        head[context.layout.columns("head")] = True
        self.compared = [head if head.any() else mask for mask in self.masks]
        """Columns of each level that k-means compares, ``(P,)`` bool."""
        self.soup = AdapterSoup(
            context.fresh_row(0).repeat(context.clients, 1), context.layout, context.shared
        )
        self.seed = context.seed
        self.assigned = torch.arange(context.clients)
        self.before = self.soup.rows.clone()
        """Initial adapter plus each client's earlier levels, ``(m, P)``."""
        self.first_loss = torch.full((context.clients,), torch.inf)
        """Validation loss (nats) of each client before the first round of this level in which it
        was scored, ``(m,)``; inf if there is none."""
        self.last_loss = torch.full((context.clients,), -torch.inf)
        """Validation loss (nats) of each client before the latest such round, ``(m,)``; -inf until
        there are two such rounds."""
        self.last_round = torch.zeros(context.clients, dtype=torch.int64)
        """Latest round in which each client took part, from 1, ``(m,)``; 0 before its first."""
        self.rounds = 0
        self._dropped: str | None = None

    def level(self, rounds: int) -> int:
        """Return the index, from 0, of the level that trains after these completed rounds."""
        later = rounds - self.recipe.global_rounds
        level = 0 if later < 0 else 1 + later // self.recipe.level_rounds
        return min(level, self.recipe.levels - 1)

    def plan(self, client: int) -> Plan:
        return Train(self.adapter(client), phases=(self.masks[self.level(self.rounds)],))

    def update(self, replies: Iterable[Reply]) -> None:
        ordered = sorted(replies, key=lambda reply: reply.client)
        level = self.level(self.rounds)
        clients, deltas, sizes = stack_replies(ordered)
        own = self.soup.rows[clients] - self.before[clients]
        trained = own - self.aggregator.clip(deltas)  # t, (k, P)
        models = self._models(level, trained, sizes)
        rows = self.soup.rows.clone()
        rows[clients] = self.before[clients] + models
        if level == 0:
            rows[:] = self.before + models[:1]
        self.soup.rows = rows
        self._note_losses(ordered)
        self.rounds += 1
        self.last_round[clients] = self.rounds
        self._dropped = None
        if self.level(self.rounds) > level:
            self._end_level(level)

    def _models(self, level: int, trained: Tensor, sizes: Tensor) -> Tensor:
        """Return each client's new model of this level, ``(k, P)``."""
        if level == self.recipe.levels - 1:
            return trained
        clusters = torch.zeros(len(trained), dtype=torch.int64)
        if level > 0:
            points = functional.normalize(trained[:, self.compared[level]].double(), dim=1)
            clusters = k_means(points, self.recipe.clusters, self.seed + self.rounds)
        count = int(clusters.max()) + 1
        return cluster_means(trained, clusters, sizes, count, self.aggregator)[clusters]

    def _note_losses(self, replies: Iterable[Reply]) -> None:
        for reply in replies:
            if (loss := (reply.served or {}).get("validation_loss")) is not None:
                known = bool(self.first_loss[reply.client].isfinite())
                (self.last_loss if known else self.first_loss)[reply.client] = loss

    def _end_level(self, level: int) -> None:
        """End a level, and begin the next one.

        Clients without a gain drop their model of the level, except of level 1.
        """
        worse = self.last_loss >= self.first_loss  # False if one of them is unknown
        if level > 0:
            self.soup.rows = torch.where(worse[:, None], self.before, self.soup.rows)
            self._dropped = (
                f"level {level + 1} ends; {int(worse.sum())} of {len(worse)} clients drop their "
                "model, because their validation loss did not decrease"
            )
        self.before = self.soup.rows.clone()
        self.first_loss = torch.full_like(self.first_loss, torch.inf)
        self.last_loss = torch.full_like(self.last_loss, -torch.inf)

    def decisions(self) -> list[str]:
        return [self._dropped] if self._dropped else []

    def traffic(self, client: int) -> tuple[int, int]:
        level, last = self.level(self.rounds), self.recipe.levels - 1
        sent = self.level(max(0, self.rounds - 1))  # level of the previous round
        up = 0 if level == last else int(self.masks[level].sum())
        if sent == last:
            return 0, up
        missed = int(self.last_round[client]) < self.rounds
        return (self.soup.layout.size if missed else int(self.masks[sent].sum())), up
