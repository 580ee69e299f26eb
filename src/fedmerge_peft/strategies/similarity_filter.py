"""Aggregation rule against colluders: clients with similar updates share one vote.

Clients that send the same vector, or almost the same, can outvote the honest clients in every rule
that treats clients alike. FoolsGold (Fung et al. 2020, arXiv 1808.04866) weights clients by their
similarity instead: updates of honest clients differ, because their data differ, while colluders
pursue one objective. FoolsGold reduces the weight of similar clients to zero, even in a small group
of honest clients with similar data. Here, similar clients share the weight of one.

For each adapter, let c_ik = cos(δ_i, δ_k) be the cosines of its users (``aggregation.py``), and w_i
their weights. The usual similarity t is the 0.75 quantile of c_ik over all pairs i ≠ k, and at
least 0. Pairs of colluders are less than a quarter of the pairs as long as colluders are less than
half of the users. The similarity κ beyond the usual one, and the votes s that remain, are

    κ_ik = max(0, c_ik − t) / (1 − t),    κ_ii = 1
    s_i  = w_i / Σ_k κ_ik

Identical updates have κ = 1, so n identical colluders have one vote. Clients that are as similar as
most pairs have κ = 0, and keep their votes. The rule then removes updates that oppose the votes of
the other clients, as in the cosine filter (``aggregation.py``):

    Δ = Σ_i a_i s_i δ_i / Σ_i a_i s_i,    a_i = 1 if Σ_k≠i s_k c_ik > 0, else 0

Similar clients still support each other with the vote that they share. A small group of honest
clients can therefore still determine its own adapter if the adapter has few other users.

With fewer than three users no client can be outvoted, and the result is the weighted mean.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies.aggregation import adapter_users
from fedmerge_peft.strategies.similarity import cosines

_USUAL = 0.75
"""Quantile of the cosines of all pairs: 1 − f² for a fraction f = 1/2 of colluders."""
_ROUNDING = 1e-9
"""Largest difference of cosines that counts as a rounding error."""


def similarity_filter(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean without updates that oppose the others; similar updates share one vote."""
    between = cosines(deltas, torch.zeros(1, 1).expand(1, deltas.shape[1]))
    rows = [similarity_filter_weights(between, column) for column in weights.T]
    return torch.stack(rows).to(deltas) @ deltas


def similarity_filter_weights(between: Tensor, weights: Tensor) -> Tensor:
    """Compute the weights of the mean, ``(k,)`` float64; they sum to 1, or all are zero.

    They are all zero if every update opposes the others.

    Args:
        between: c, cosines of all pairs of updates, ``(k, k)`` float64.
        weights: w, ``(k,)`` float64; sums to 1, or is zero.
    """
    users = adapter_users(weights)
    if len(users) < 3:
        return weights
    c = between[users][:, users]
    votes = weights[users] / excess_similarity(c).sum(dim=1)
    agree = c @ votes - c.diagonal() * votes > 0
    kept = torch.zeros_like(weights)
    kept[users] = torch.where(agree, votes, 0.0)
    return kept / kept.sum().clamp_min(torch.finfo(torch.float64).tiny)


def excess_similarity(c: Tensor) -> Tensor:
    """Compute κ ``(k, k)``, the similarity beyond the usual one, from cosines c ``(k, k)``."""
    others = ~torch.eye(len(c), dtype=torch.bool)
    usual = min(1.0, max(0.0, float(np.quantile(c[others].numpy(), _USUAL))))
    excess = c - usual
    excess = torch.where(excess > _ROUNDING, excess / max(1 - usual, _ROUNDING), 0.0)
    return excess.clamp(0, 1).fill_diagonal_(1.0)
