"""Checks of tensors, and norms of long vectors, computed at memory bandwidth."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedmerge_peft.util.ranges import MAX_NORM
from fedmerge_peft.util.stateful import describe

_BLOCK = 1 << 10
"""Number of squares that are summed in float32 before the sum continues in float64."""


def all_finite(values: Tensor) -> bool:
    """Return True if no value is NaN or infinite.

    A non-finite value makes the sum non-finite. The single values are checked only if the sum is
    not finite, since finite values can overflow it.
    """
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


def row_norms(rows: Tensor) -> Tensor:
    """Compute ‖row‖₂ of float32 rows ``(k, P)`` as float64 ``(k,)``, with relative error 10⁻⁶.

    Squares are summed within blocks in float32 and across blocks in float64. A row whose squares
    may overflow or underflow float32 is summed in float64.
    """
    blocked = rows.shape[1] // _BLOCK * _BLOCK
    blocks = torch.linalg.vector_norm(
        rows[:, :blocked].reshape(len(rows), blocked // _BLOCK, _BLOCK), dim=2
    ).double()
    rest = torch.linalg.vector_norm(rows[:, blocked:], dim=1).double()
    norms: Tensor = (blocks.square().sum(dim=1) + rest.square()).sqrt()
    unreliable = ~torch.isfinite(norms) | (norms < 1e-12)
    for number in unreliable.nonzero().flatten().tolist():
        norms[number] = rows[number].double().norm()
    return norms


def norm_fault(rows: Tensor) -> str | None:
    """Return the reason why adapters or updates ``(k, P)`` are out of range; None if they are not.

    Rows are in range if all values are finite and each L2 norm is at most ``MAX_NORM``.
    """
    if not len(rows):
        return None
    largest = float(row_norms(rows.float()).max())  # NaN if any norm is
    if math.isfinite(largest) and largest <= MAX_NORM:
        return None
    if not all_finite(rows):
        return "not finite"
    return f"too large: its norm is {largest:.3g}, expected at most {MAX_NORM:g}"


def tensor_mismatch(value: object, shape: tuple[int, ...]) -> str | None:
    """Describe how a value differs from a finite, dense float32 CPU tensor of ``shape``.

    Return None if it does not differ.
    """
    if not isinstance(value, Tensor):
        return f"of type {type(value).__name__}, expected a tensor"
    if value.layout is not torch.strided or value.device.type != "cpu":
        layout = str(value.layout).removeprefix("torch.")
        return f"{layout} on {value.device}, expected strided on the CPU"
    if value.dtype != torch.float32 or tuple(value.shape) != shape:
        return f"{describe(value)}, expected float32 {shape}"
    return None if all_finite(value) else "not finite"
