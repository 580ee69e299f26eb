"""FoolsGold (Fung et al. 2020, arXiv 1808.04866), for comparison.

With cosines c_ik of the users' updates and v_i = max_k c_ik, pardoning sets c_ik ← c_ik v_i / v_k
if v_i < v_k. The weight of client i is logit(α_i / max α) + ½, clipped to [0, 1], with
α_i = 1 − max_k c_ik. The authors accumulate the updates of all rounds; a rule sees one round.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft import register_aggregation
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies.aggregation import adapter_users
from fedmerge_peft.strategies.similarity import cosines

_TINY = 1e-9


@register_aggregation("foolsgold")
def foolsgold(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean without the clients whose updates are most similar to another."""
    between = cosines(deltas, torch.zeros(1, deltas.shape[1])).fill_diagonal_(-1.0)
    rows = []
    for column in weights.T:
        users, kept = adapter_users(column), column.clone()
        if len(users) > 2:
            kept = torch.zeros_like(column)
            kept[users] = column[users] * foolsgold_weights(between[users][:, users])
        rows.append(kept / kept.sum().clamp_min(_TINY))
    return torch.stack(rows).to(deltas) @ deltas


def foolsgold_weights(c: Tensor) -> Tensor:
    """Compute the weights, ``(k,)``, from cosines ``(k, k)`` with a diagonal of −1."""
    v = c.max(dim=1).values
    pardoned = torch.where(v[:, None] < v, c * v[:, None] / v.clamp_min(_TINY), c)
    alpha = (1 - pardoned.max(dim=1).values).clamp(0, 1)
    alpha = (alpha / alpha.max().clamp_min(_TINY)).clamp(_TINY, 0.99)
    return (torch.log(alpha / (1 - alpha)) + 0.5).clamp(0, 1)
