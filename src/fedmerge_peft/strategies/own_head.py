"""Own heads of clients, and the decision whether clients need them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Self

import torch
from torch import Tensor

from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.label_counts import fit_concentration
from fedmerge_peft.training.plan import InTurn, Plan, Train
from fedmerge_peft.util.stateful import Stateful


class OwnHead(Stateful):
    """Own parts of the clients' heads, which are added to their merged heads.

    The head of client i is the merged head plus U_i, which starts at 0:

        θ_i,head = Σ_j π_ij Θ_j,head + U_i,    U_i ← U_i − δ'_i,head

    In each round a client trains twice: first the merged adapter Σ_j π_ij Θ_j, whose update δ_i
    moves the soup and the weights, then the head of θ_i, whose update is δ'_i. The soup is thus
    trained with the head that clients share, and U_i learns what they do not share. A client alone
    in its group has U_i = 0 and trains once.
    """

    state_fields = ("rows", "alone")

    def __init__(self, alone: Tensor, columns: Tensor, size: int) -> None:
        """Create own parts of 0.

        Args:
            alone: True for clients that are alone in their group, ``(m,)`` bool.
            columns: Columns of the head, ``(h,)`` int64.
            size: P, the number of parameters of an adapter.
        """
        self.alone = alone
        self.columns = columns
        self.rows = torch.zeros(len(alone), len(columns))
        """U, ``(m, h)``."""
        self._mask = torch.zeros(size, dtype=torch.bool)
        self._mask[columns] = True

    @classmethod
    def empty(cls, context: StrategyContext, columns: Tensor) -> Self:
        """Return own parts of 0 for clients none of which is alone, before a state is loaded."""
        alone = torch.zeros(context.clients, dtype=torch.bool)
        return cls(alone, columns, context.layout.size)

    def plan(self, merged: Tensor, client: int, compared: Tensor | None) -> Plan:
        """Return the plan of a client.

        Args:
            merged: The client's merged adapter, without its own part, ``(P,)``.
            client: Index of the client.
            compared: Another adapter ``(P,)`` whose validation loss the client reports, or None.
        """
        if self.alone[client]:
            return Train(merged, compared=compared)
        head = Train(self.added(merged, client), phases=(self._mask,))
        return InTurn((Train(merged), head), joined=True, compared=compared)

    def added(self, merged: Tensor, client: int) -> Tensor:
        """Return a copy of an adapter ``(P,)`` with the client's own part."""
        row = merged.clone()
        row[self.columns] += self.rows[client]
        return row

    def update(self, replies: Iterable[Reply]) -> None:
        """Step the own parts of the clients that have replied."""
        rows = self.rows.clone()
        for reply in replies:
            if not self.alone[reply.client]:
                rows[reply.client] -= reply.deltas[1, self.columns]
        self.rows = rows


def decide_own_heads(
    setting: bool | Literal["auto"],
    context: StrategyContext,
    columns: Tensor,
    clients: Tensor,
    groups: Tensor,
) -> tuple[OwnHead | None, list[str]]:
    """Decide whether clients get own heads: as the recipe says, or as their labels do.

    Args:
        setting: ``strategy.own_head`` of the recipe.
        context: Context of the strategy, with the clients' label counts.
        columns: Columns of the head, ``(h,)`` int64.
        clients: Clients that were grouped, ``(k,)``.
        groups: Their groups, ``(k,)``.

    Returns:
        The own heads or None, and a list with the decision and its reason. The list is empty if
        ``auto`` lacks label counts or a head.
    """
    counts = context.label_counts
    if setting != "auto":
        needed, reason = setting, "as set in the recipe"
    elif counts is None or len(columns) == 0 or not counts[clients].any():
        return None, []
    else:
        needed, reason = labels_differ(counts, clients, groups)
    if not needed:
        return None, [f"shared heads: {reason}"]
    own = OwnHead.empty(context, columns)
    own.alone[clients] = torch.bincount(groups)[groups] == 1
    return own, [f"own heads: {reason}"]


def labels_differ(counts: Tensor, clients: Tensor, groups: Tensor) -> tuple[bool, str]:
    """Return True if clients of a group differ in their label distributions, and the reason.

    Args:
        counts: Training examples of each client by label, ``(m, classes)``.
        clients: Clients that were grouped, ``(k,)``; at least one of them has examples.
        groups: Their groups, ``(k,)``.
    """
    known = counts[clients].sum(dim=1) > 0
    groups = groups[known]
    if gain := own_labels_gain(counts[clients[known]], groups):
        return True, (
            "the clients' own label distributions explain the labels better than those of their "
            f"groups, by {gain:.0f} nats in total"
        )
    if len(set(groups.tolist())) == len(groups):
        return False, "each group has only one client with known labels"
    return False, "within a group, clients have about the same labels"


def own_labels_gain(counts: Tensor, groups: Tensor) -> float:
    """Estimate how much better clients' own labels predict their labels than their groups' labels.

    ``fit_concentration`` predicts a client's labels from its own counts, with the weight
    n_i / (n_i + a), and from the counts of the other clients in its group. If all clients of a
    group have the same distribution, all examples count alike, so a is the number of examples of
    the other clients.

    Args:
        counts: n, training examples of each client by label, ``(m, classes)``; at least one for
            each client.
        groups: Group of each client, ``(m,)`` int64.

    Returns:
        The gain in log-likelihood (nats) over equal distributions within each group. It is 0 if it
        is at most the logarithm of the number of examples, as in the Bayesian information criterion
        with two parameters, or if a gives no client's own counts more weight than an equal
        distribution would.
    """
    counts = counts.double()
    sums = torch.zeros(int(groups.max()) + 1, counts.shape[1], dtype=torch.float64)
    sums.index_add_(0, groups, counts)
    others = sums[groups] - counts
    amount = others.sum(dim=1)
    shared = amount > 0
    if not shared.any():
        return 0.0
    concentration, gain = fit_concentration(counts[shared], others[shared])
    return gain if bool((amount[shared] > concentration).any()) else 0.0
