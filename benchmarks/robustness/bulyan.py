"""Bulyan (El Mhamdi et al. 2018, arXiv 1802.07927), for comparison.

Krum selects n − 2f of the n users, one after another. Each coordinate of the result is the mean of
the n − 4f values nearest to the median of the selected ones. f is the largest number that the
method permits, n ≥ 4f + 3: 6 of 30 clients. Users count the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft import register_aggregation
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies.aggregation import adapter_users


@register_aggregation("bulyan")
def bulyan(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Mean, coordinate by coordinate, of the values nearest to the median of Krum's selection."""
    rows = []
    for column in weights.T:
        users = adapter_users(column)
        rows.append(bulyan_mean(deltas[users]) if len(users) > 2 else column.to(deltas) @ deltas)
    return torch.stack(rows)


def bulyan_mean(deltas: Tensor) -> Tensor:
    """Combine updates ``(n, P)``, at least three of them, to one, ``(P,)``."""
    count = len(deltas)
    hostile = (count - 3) // 4
    squares = torch.cdist(deltas.double(), deltas.double()).square()
    left, chosen = list(range(count)), []
    while len(chosen) < count - 2 * hostile:
        sorted_rows = squares[left][:, left].sort(dim=1).values
        nearest = sorted_rows[:, 1 : 1 + max(1, len(left) - hostile - 2)]  # column 0 is itself
        chosen.append(left.pop(int(nearest.sum(dim=1).argmin())))
    selected = deltas[chosen]
    distances = (selected - selected.median(dim=0).values).abs()
    kept = distances.argsort(dim=0)[: count - 4 * hostile]
    return selected.gather(0, kept).mean(dim=0)
