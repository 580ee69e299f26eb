"""Own heads of clients, and the choice of their weights."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import StrategyContext
from fedmerge_peft.strategies.label_counts import fit_concentration
from fedmerge_peft.util.stateful import Stateful


class OwnHead(Stateful):
    """Own heads of the clients, which are mixed with their merged heads.

    The head of client i is merged from the heads of the soup and from its own head H_i:

        θ_i,head = (1 − s_i) Σ_j π_ij Θ_j,head + s_i H_i,    H_i ← H_i − δ_i,head

    In the columns of the head, H_i thus has the weight s_i, and adapter j has the weight
    (1 − s_i) π_ij. An own head starts with the first update of the client that this object
    receives; until then s_i counts as 0.
    """

    state_fields = ("rows", "shares", "started")

    def __init__(self, size: int, shares: Tensor) -> None:
        """Create own heads, none of which has started.

        Args:
            size: h, the number of parameters of a head.
            shares: s, ``(m,)`` float32.
        """
        self.shares = shares
        self.rows = torch.zeros(len(shares), size)
        """H, ``(m, h)``."""
        self.started = torch.zeros(len(shares), dtype=torch.bool)
        """True for clients whose own head has started, ``(m,)``."""

    def update(self, clients: Tensor, served: Tensor, deltas: Tensor) -> None:
        """Step the own heads of these clients. A new own head starts from the served head.

        Args:
            clients: Client indices, ``(k,)``.
            served: The heads that these clients were sent, ``(k, h)``.
            deltas: δ in the columns of the head, ``(k, h)``.
        """
        new = ~self.started[clients]
        self.rows[clients[new]] = served[new]
        self.started[clients] = True
        self.rows[clients] -= deltas

    def residuals(self, merged: Tensor, clients: slice | Tensor = slice(None)) -> Tensor:
        """Compute s_i (H_i − Σ_j π_ij Θ_j,head), ``(k, h)``, to add to the merged heads.

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
    """Create own heads with the recipe's share, or with shares that follow from the labels.

    Args:
        share: s of all clients, or ``auto``.
        size: h, the number of parameters of a head.
        context: Context of the strategy, with the clients' label counts.
        clients: Clients that were grouped, ``(k,)``.
        groups: Their groups, ``(k,)``.

    Returns:
        The own heads, or None if all s_i are 0, and a list with the decision and its reason. The
        list is empty if ``auto`` lacks label counts or a head.
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
    """Choose the weights of own heads, ``(m,)`` float32; return the weights and the reason.

    Clients without known labels or without a group get the mean weight.

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
    if shares.any():
        reason = (
            "the clients' own label distributions explain the labels better than those of their "
            f"groups, by {gain:.0f} nats in total"
        )
    elif len(set(groups[known].tolist())) == len(clients):
        reason = "each group has only one client with known labels"
    else:
        reason = "within a group, clients have about the same labels"
    return shares, reason


def own_shares(counts: Tensor, groups: Tensor) -> tuple[Tensor, float]:
    """Estimate to what extent a client's label distribution differs from that of its group.

    ``fit_concentration`` predicts a client's labels from its own counts, with the weight
    n_i / (n_i + a), and from the counts of the other clients in its group. If all clients of a
    group have the same distribution, all examples count alike, so a is the number of examples of
    the other clients. The share is the excess of the weight n_i / (n_i + a) over its value for this
    a, divided by the largest possible excess. It is 0 for a client that is alone in its group.

    Args:
        counts: n, training examples of each client by label, ``(m, classes)``; at least one for
            each client.
        groups: Group of each client, ``(m,)`` int64.

    Returns:
        The shares ``(m,)`` float32, from 0 to 1, and their gain in log-likelihood (nats) over equal
        distributions within each group. The shares are 0 if the gain is at most the logarithm of
        the number of examples, as in the Bayesian information criterion with two parameters.
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
