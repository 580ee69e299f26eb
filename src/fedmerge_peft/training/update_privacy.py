"""Clipping and noise of an update before it leaves its client (docs/privacy.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdatePrivacy:
    """Clipping δ · min(1, clip / ‖δ‖₂), plus Gaussian noise in the trained columns."""

    clip: float
    """Bound on the L2 norm."""
    noise: float
    """Standard deviation of the noise on each value; 0 for none."""


def apply_update_privacy(
    delta: Tensor, privacy: UpdatePrivacy, phases: Sequence[Tensor | None], seed: int
) -> Tensor:
    """Clip an update ``(P,)`` and add noise to the columns that are trained in any phase."""
    norm = max(float(delta.double().norm()), torch.finfo(torch.float64).tiny)
    delta = delta * min(1.0, privacy.clip / norm)
    generator = torch.Generator().manual_seed(seed)
    noise = privacy.noise * torch.randn(delta.shape, generator=generator)
    masks = [columns for columns in phases if columns is not None]
    if len(masks) < len(phases):
        return delta + noise
    return torch.where(torch.stack(masks).any(dim=0), delta + noise, delta)
