"""First merging weights of clients that have been grouped, from their similarity to each group."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = 60
"""Bisections; they determine κ to the precision of float64."""
_LARGEST = 1e4
"""Largest κ, if even it does not reach the weight."""


def affinities(cosines: Tensor, groups: Tensor) -> Tensor:
    """Compute s_ij, the cosine between client i's direction and the mean of the others in group j.

    Args:
        cosines: Cosines of the directions of all pairs of clients, ``(m, m)`` float64.
        groups: Group of each client, ``(m,)`` int64, from 0.

    Returns:
        ``(m, groups)`` float64. A client that is alone in its group has 1 there.
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


def first_logits(similar: Tensor, groups: Tensor, weight: float) -> Tensor:
    """Return the logarithms of first weights π ``(m, groups)`` float64, with g client i's group:

        π_ij = (1 − λ) softmax_j(κ s_ij) + λ / groups

    κ and λ are such that the mean over the clients of softmax_j(κ s_ij)_g is half way between
    ``weight`` and 1, and that of π_ig is ``weight``. A client that resembles several groups, such
    as one with few examples, thus starts between them, and its weights can still learn where it
    belongs. Clear clients have about even weights for all other groups: in trials, weights for
    similar groups alone were worse for them.

    Args:
        similar: s of ``affinities``, ``(m, groups)``.
        groups: Group of each client, ``(m,)`` int64.
        weight: Mean weight, from 1 / groups to 1.
    """

    def own(weights: Tensor) -> float:
        return float(weights.gather(1, groups[:, None]).mean())

    target = (1 + weight) / 2
    low, high = 0.0, _LARGEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        below = own(torch.softmax(middle * similar, dim=1)) < target
        low, high = (middle, high) if below else (low, middle)
    soft, even = torch.softmax(low * similar, dim=1), 1 / similar.shape[1]
    reached = own(soft)
    mixed = min(max((reached - weight) / (reached - even), 0.0), 1.0) if reached > even else 1.0
    return ((1 - mixed) * soft + mixed * even).log()
