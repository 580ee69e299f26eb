"""Adapters in equal use: what keeps clients from falling onto one adapter while others stand unused."""

from __future__ import annotations

import torch
from torch import Tensor

_MOST_SWEEPS = 200
_CLOSE = 1e-4


def balanced(weights: Tensor, strength: float) -> Tensor:
    """π with each adapter's logit shifted, the same for all clients, towards equal mass on the adapters.

    Sinkhorn's iteration finds the shifts v for which the columns of softmax(log π + v) have equal sums (Sinkhorn 1964; for
    balanced assignments, Caron et al. 2020, arXiv 2006.09882). The result is softmax(log π + strength · v).

    Args:
        weights: π, ``(m, d)``, positive; rows sum to 1.
        strength: 0 leaves π as it is, 1 balances it.
    """
    logs = weights.double().log()
    clients, adapters = weights.shape
    shift = torch.zeros(adapters, dtype=torch.float64)
    for _ in range(_MOST_SWEEPS):
        mass = torch.softmax(logs + shift, dim=1).sum(dim=0) * adapters / clients
        shift -= mass.log()
        if float((mass - 1).abs().max()) < _CLOSE:
            break
    return torch.softmax(logs + strength * shift, dim=1).to(weights)
