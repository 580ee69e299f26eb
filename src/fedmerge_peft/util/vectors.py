"""Checks and lengths of long vectors, at the speed of memory and without what long float32 sums lose."""

from __future__ import annotations

import torch
from torch import Tensor

from fedmerge_peft.util.stateful import described

_BLOCK = 1 << 10
"""Numbers whose squares are summed in float32 at a time."""


def finite(values: Tensor) -> bool:
    """Whether all of them are. One that is not makes their sum not finite either; only where the sum itself overflows is each looked at."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def lengths(rows: Tensor) -> Tensor:
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


def tensor_mismatch(value: object, shape: tuple[int, ...]) -> str | None:
    """Return how a value differs from a finite, dense float32 CPU tensor of this shape, or None."""
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, expected a tensor"
    if value.layout is not torch.strided or value.device.type != "cpu":
        layout = str(value.layout).removeprefix("torch.")
        return f"{layout} on {value.device}, expected strided on the CPU"
    if value.dtype != torch.float32 or tuple(value.shape) != shape:
        return f"{described(value)}, expected float32 {shape}"
    return None if finite(value) else "not finite"
