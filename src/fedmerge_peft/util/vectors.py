"""Checks and lengths of long vectors, at the speed of memory and without what long float32 sums lose."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK = 1 << 10
"""Numbers whose squares are summed in float32 at a time."""


def all_finite(values: Tensor) -> bool:
    """Whether all of them are. One that is not makes their sum not finite either; only where the sum itself overflows is each looked at."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def row_norms(rows: Tensor) -> Tensor:
    """‖row‖₂ of each of ``(k, P)`` float32 rows, ``(k,)`` float64, to about 10⁻⁶.

    Blocks are summed in float32, their sums in float64. Rows whose squares a block cannot hold, too large or too small, are taken one
    by one in float64.
    """
    whole = rows.shape[1] // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(
        rows[:, :whole].reshape(len(rows), whole // _BLOCK, _BLOCK), dim=2
    ).double()
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1).double()
    found: Tensor = (blocks.square().sum(dim=1) + rest.square()).sqrt()
    unsure = ~torch.isfinite(found) | (found < 1e-12)
    for number in unsure.nonzero().flatten().tolist():
        found[number] = rows[number].double().norm()
    return found
