"""Adapters in equal use: what keeps clients from falling onto one adapter while others stand unused."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MOST_SWEEPS = 200
_CLOSE = 1e-4


def balancing_shifts(logits: Tensor) -> Tensor:
    """What to add to each adapter's logit, the same for all clients, so that all adapters have equal mass: ``(d,)`` float64.

    Sinkhorn's iteration finds v for which the columns of softmax(W + v) have equal sums (Sinkhorn 1964; for balanced
    assignments, Caron et al. 2020, arXiv 2006.09882). With part of v, π is part of the way.

    Args:
        logits: ``(m, d)``.
    """
    logs = torch.log_softmax(logits.double(), dim=1)
    clients, adapters = logits.shape
    shifts = torch.zeros(adapters, dtype=torch.float64)
    for _ in range(_MOST_SWEEPS):
        log_mass = torch.logsumexp(torch.log_softmax(logs + shifts, dim=1), dim=0) + math.log(
            adapters / clients
        )
        shifts -= log_mass
        if float(log_mass.abs().max()) < _CLOSE:
            break
    return shifts
