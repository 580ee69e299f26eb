"""Reassignment of unused adapters of FedMerge's soup."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.adapters.merging_weights import UNUSED_SHARE
from fedmerge_peft.strategies.similarity import split_by_direction
from fedmerge_peft.util.stateful import Stateful


class Reseeding(Stateful):
    """Reassignment of an unused adapter to some clients of the most used adapter.

    The reassignment happens when an adapter has been unused for ``patience`` consecutive rounds.
    The clients that replied, and whose largest weight is that of the most used adapter, are split
    in two by the directions of their updates, as clustered federated learning splits a cluster
    (Sattler et al. 2020, arXiv 1910.01991). The unused adapter becomes a copy of the most used
    adapter, and the smaller part of these clients moves to it. Fewer than two such clients are not
    split.
    """

    state_fields = ("idle",)

    def __init__(self, patience: int, adapters: int, seed: int) -> None:
        self.patience = patience
        self.seed = seed
        self.idle = torch.zeros(adapters, dtype=torch.int64)
        """Number of consecutive rounds for which each adapter has been unused, ``(d,)`` int64."""

    def apply(
        self, rows: Tensor, logits: Tensor, weights: Tensor, clients: Tensor, deltas: Tensor
    ) -> None:
        """Reassign at most one adapter before the round's soup step; change Θ and W in place.

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
