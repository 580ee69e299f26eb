"""Clipping and noise of an update before it leaves its client (docs/privacy.md)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge_peft.util.gaussian_noise import add_noise


@dataclass(frozen=True)
class UpdatePrivacy:
    """Clipping δ · min(1, clip / ‖δ‖₂), plus Gaussian noise in the trained columns."""

    clip: float
    """Bound on the L2 norm; infinite without clipping."""
    noise: float
    """Standard deviation of the noise on each value; 0 without noise."""

    def __post_init__(self) -> None:
        """Raise ``ValueError`` if a number is out of range."""
        if not self.clip > 0:
            raise ValueError(f"clip: found {self.clip}, expected a positive number")
        if not 0 <= self.noise < math.inf:
            raise ValueError(f"noise: found {self.noise}, expected a finite number of at least 0")

    @property
    def mu_squared(self) -> float:
        """μ² of one update for μ-GDP, (2 clip / noise)²; infinite without clipping or noise.

        The distance between two clipped updates is at most 2 clip.
        """
        mu = 2 * self.clip / self.noise if self.noise else math.inf
        return mu * mu


def apply_update_privacy(
    delta: Tensor, privacy: UpdatePrivacy, phases: Sequence[Tensor | None], seed: int | None
) -> Tensor:
    """Clip an update ``(P,)`` and add noise to the columns that are trained in any phase.

    All other columns of the result are zero.

    Args:
        delta: The update.
        privacy: Clip and noise.
        phases: For each phase, the mask ``(P,)`` of the columns that it trains; None if it trains
            all columns.
        seed: Seed of a simulation's noise; None for the operating system's generator.
    """
    norm = max(float(delta.double().norm()), torch.finfo(torch.float64).tiny)
    noisy = add_noise(delta * min(1.0, privacy.clip / norm), privacy.noise, seed)
    masks = [columns for columns in phases if columns is not None]
    if len(masks) < len(phases):
        return noisy
    if not masks:
        return torch.zeros_like(delta)
    return torch.where(torch.stack(masks).any(dim=0), noisy, 0.0)
