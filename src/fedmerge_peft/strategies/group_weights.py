"""Initial merging weights of clients after their grouping."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmerge_peft.strategies.similarity import Grouping

_STEPS = 60
"""Number of bisections for κ of ``first_logits``, enough for the precision of float64."""
_LARGEST = 1e4
"""Upper limit of κ, used if no smaller κ reaches the mean weight that ``first_logits`` requires."""


def affinities(cosines: Tensor, groups: Tensor) -> Tensor:
    """Compute s_ij, the cosine of client i's direction and the mean direction of group j without i.

    Args:
        cosines: Cosines of the directions of all pairs of clients, ``(m, m)`` float64.
        groups: Group of each client, ``(m,)`` int64, from 0.

    Returns:
        s, ``(m, groups)`` float64. If client i is alone in group j, s_ij is 1.
    """
    members = torch.nn.functional.one_hot(groups, int(groups.max()) + 1).double()
    own = torch.arange(len(groups)), groups
    along = cosines @ members  # ⟨u_i, Σ_{k in j} u_k⟩
    squares = (members.T @ cosines @ members).diagonal().repeat(len(groups), 1)
    squares[own] += cosines.diagonal() - 2 * along[own]  # ‖Σ u_k‖² without client i itself
    along[own] -= cosines.diagonal()
    lengths = squares.clamp_min(0).sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    similar = (along / lengths).clamp(-1, 1)
    similar[own] = torch.where(members.sum(dim=0)[groups] > 1, similar[own], 1.0)
    return similar


def first_logits(similar: Tensor, weight: float) -> Tensor:
    """Compute the logarithms of the initial weights π, ``(m, groups)`` float64:

        π_ij = (1 − λ) softmax_j(κ s_ij) + λ / groups

    κ is chosen such that the mean of max_j softmax_j(κ s_ij) over the clients is half way between
    ``weight`` and 1. λ is chosen such that the mean of max_j π_ij is ``weight``. A client that
    resembles several groups, such as a client with few examples, thus starts between them, and its
    weights can still learn its group. A client that clearly belongs to one group has about equal
    weights for all other groups. In experiments, such clients did worse with weights that depend
    on the similarity alone (λ = 0).

    Args:
        similar: s of ``affinities``, ``(m, groups)``.
        weight: Mean, over the clients, of the weight of a client's most similar group, from
            1 / groups to 1.
    """

    def highest(weights: Tensor) -> float:
        return float(weights.max(dim=1).values.mean())

    target, even = (1 + weight) / 2, 1 / similar.shape[1]
    low, high = 0.0, _LARGEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        below = highest(torch.softmax(middle * similar, dim=1)) < target
        low, high = (middle, high) if below else (low, middle)
    soft = torch.softmax(low * similar, dim=1)
    reached = highest(soft)
    # ``reached`` is below the target if clients resemble groups equally. A lower limit on λ keeps
    # all weights positive.
    mixed = (reached - weight) / (reached - even) if reached > even else 1.0
    mixed = min(max(mixed, (1 - weight) / 2), 1.0)
    return ((1 - mixed) * soft + mixed * even).log()


def grouping_logits(grouping: Grouping, adapters: int, weight: float) -> Tensor:
    """Return the logits ``(k, adapters)`` float32 of k clients after their grouping.

    If each adapter has a group, the logits follow from the similarity of clients and groups
    (``first_logits``). If there are more adapters than groups, ``group_logits`` computes them.
    """
    if int(grouping.groups.max()) + 1 < adapters:
        return group_logits(grouping.groups, adapters, weight)
    return first_logits(affinities(grouping.directions, grouping.groups), weight).float()


def group_logits(groups: Tensor, adapters: int, weight: float) -> Tensor:
    """Return logits ``(k, adapters)`` float32 with this weight for the adapter of a client's group.

    The other adapters share the remaining weight equally.
    """
    logits = torch.zeros(len(groups), adapters)
    if adapters > 1:  # all other logits are zero
        own = math.log(weight * (adapters - 1) / (1 - weight))
        logits[torch.arange(len(groups)), groups] = own
    return logits
