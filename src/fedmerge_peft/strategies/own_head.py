"""Own heads of clients, and their weight."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.strategies.label_counts import fit_concentration
from fedmerge_peft.util.stateful import Stateful


class OwnHead(Stateful):
    """Own heads of the clients, as a second block of merging weights.

    The head of client i is merged from those of the soup and from its own one, H_i:

        θ_i,head = (1 − s_i) Σ_j π_ij Θ_j,head + s_i H_i,    H_i ← H_i − δ_i,head

    In the block of the head, the client thus gives its own adapter the weight s_i, and adapter j
    the weight (1 − s_i) π_ij. An own head exists from the client's first reply on; until then s_i
    counts as 0.
    """

    state_fields = ("rows", "shares", "started")

    def __init__(self, size: int, shares: Tensor) -> None:
        """Create heads that no client has started.

        Args:
            size: h, the number of parameters of a head.
            shares: s, ``(m,)`` float32.
        """
        self.shares = shares
        self.rows = torch.zeros(len(shares), size)
        """H, ``(m, h)``."""
        self.started = torch.zeros(len(shares), dtype=torch.bool)
        """True for clients that have replied since the heads exist, ``(m,)``."""

    def update(self, clients: Tensor, served: Tensor, deltas: Tensor) -> None:
        """Take a step with the updates of these clients; new ones start from their served head.

        Args:
            clients: Client indices, ``(k,)``.
            served: The heads that these clients trained, ``(k, h)``.
            deltas: δ in the columns of the head, ``(k, h)``.
        """
        new = ~self.started[clients]
        self.rows[clients[new]] = served[new]
        self.started[clients] = True
        self.rows[clients] -= deltas

    def residuals(self, merged: Tensor, clients: slice | Tensor = slice(None)) -> Tensor:
        """Return s_i (H_i − Σ_j π_ij Θ_j,head), what to add to the merged heads ``(k, h)``.

        Args:
            merged: Σ_j π_ij Θ_j,head, ``(k, h)`` or ``(h,)``.
            clients: Indices of the k clients; all by default.
        """
        shares = (self.shares * self.started)[clients]
        return shares[:, None] * (self.rows[clients] - merged)


def make_own_heads(
    share: float | Literal["auto"],
    size: int,
    context: StrategyContext,
    clients: Tensor,
    groups: Tensor,
) -> tuple[OwnHead | None, list[str]]:
    """Create own heads with the recipe's share, or one that follows from the clients' labels.

    Args:
        share: s of all clients, or ``auto``.
        size: h, the number of parameters of a head.
        context: Number of clients, and their label counts.
        clients: Clients that were grouped, ``(k,)``.
        groups: Their groups, ``(k,)``.

    Returns:
        The own heads, None if the head is shared; and the reason, if there is a choice.
    """
    counts = context.label_counts
    if share != "auto":
        shares, reason = torch.full((context.clients,), share), "as set in the recipe"
    elif counts is None or size == 0 or not counts[clients].any():
        return None, []
    else:
        shares, reason = choose_shares(counts, clients, groups)
    if not shares.any():
        return None, [f"shared heads: {reason}"]
    weight = float(shares[clients].mean())
    return OwnHead(size, shares), [f"own heads with a mean weight of {weight:.2f}: {reason}"]


def choose_shares(counts: Tensor, clients: Tensor, groups: Tensor) -> tuple[Tensor, str]:
    """Choose the weights of own heads, and return them ``(m,)`` with the reason.

    Clients without known labels, and those that are in no group yet, get the mean.

    Args:
        counts: Training examples of each client by label, ``(m, classes)``.
        clients: Clients that were grouped, ``(k,)``; at least one of them has examples.
        groups: Their groups, ``(k,)``.
    """
    known = counts[clients].sum(dim=1) > 0
    clients = clients[known]
    estimated, gain = own_shares(counts[clients], groups[known])
    shares = estimated.mean().repeat(len(counts))
    shares[clients] = estimated
    reason = (
        f"own label distributions explain the labels better by {gain:.0f} nats"
        if shares.any()
        else "within a group, clients have about the same labels"
    )
    return shares, reason


def own_shares(counts: Tensor, groups: Tensor) -> tuple[Tensor, float]:
    """Estimate how much of a client's label distribution is its own, within its group.

    ``fit_concentration`` predicts a client's labels from its own and those of the others in its
    group, and gives the own counts a weight of n_i / (n_i + a). If clients of a group have the same
    distribution, a is the number of the others' examples: all examples count alike. The own share
    is what exceeds this.

    Args:
        counts: n, training examples of each client by label, ``(m, classes)``; at least one for
            each client.
        groups: Group of each client, ``(m,)`` int64.

    Returns:
        The shares ``(m,)`` float32, from 0 to 1, and the log-likelihood (nats) that they gain over
        equal distributions. The shares are 0 if the gain is less than the logarithm of the number
        of examples, as in the Bayesian information criterion with two parameters.
    """
    counts = counts.double()
    sums = torch.zeros(int(groups.max()) + 1, counts.shape[1], dtype=torch.float64)
    sums.index_add_(0, groups, counts)
    others = sums[groups] - counts
    size, amount = counts.sum(dim=1), others.sum(dim=1)
    shared = amount > 0
    if not shared.any():
        return torch.zeros(len(counts)), 0.0
    concentration, gain = fit_concentration(counts[shared], others[shared])
    size, amount = size[shared], amount[shared]
    own, pooled = size / (size + concentration), size / (size + amount)
    shares = torch.zeros(len(counts), dtype=torch.float64)
    shares[shared] = ((own - pooled) / (1 - pooled)).clamp_min(0)
    return shares.float(), gain
