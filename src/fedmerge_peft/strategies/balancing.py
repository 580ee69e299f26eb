"""Balanced use of adapters: shifts of the merging logits that give all adapters equal mass."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MAX_ITERATIONS = 200
_TOLERANCE = 1e-4


def balancing_shifts(logits: Tensor) -> Tensor:
    """Compute shifts of the adapters' logits that give all adapters equal mass.

    Sinkhorn's iteration finds v such that the columns of softmax(W + v) have equal sums (Sinkhorn
    1964; for balanced assignments, Caron et al. 2020, arXiv 2006.09882). The same v applies to all
    clients. A fraction of v balances π partially.

    Args:
        logits: W, ``(m, d)``.

    Returns:
        v, ``(d,)`` float64.
    """
    logs = torch.log_softmax(logits.double(), dim=1)
    clients, adapters = logits.shape
    shifts = torch.zeros(adapters, dtype=torch.float64)
    for _ in range(_MAX_ITERATIONS):
        log_mass = torch.logsumexp(torch.log_softmax(logs + shifts, dim=1), dim=0) + math.log(
            adapters / clients
        )
        shifts -= log_mass
        if float(log_mass.abs().max()) < _TOLERANCE:
            break
    return shifts
