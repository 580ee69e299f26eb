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
    """Return logits κ (s_ij − s_ig), with g the group of client i, ``(m, groups)`` float64.

    κ is such that the mean weight of the clients' own groups is

        (1/m) Σ_i softmax_j(κ s_ij)_g = weight

    A client that resembles several groups, such as one with few examples, thus starts between
    them, and its weights can still learn where it belongs.

    Args:
        similar: s of ``affinities``, ``(m, groups)``.
        groups: Group of each client, ``(m,)`` int64.
        weight: Mean weight, from 1 / groups to 1.
    """
    relative = similar - similar.gather(1, groups[:, None])
    low, high = 0.0, _LARGEST
    for _ in range(_STEPS):
        middle = (low + high) / 2
        own = torch.softmax(middle * relative, dim=1).gather(1, groups[:, None])
        low, high = (middle, high) if float(own.mean()) < weight else (low, middle)
    return low * relative
