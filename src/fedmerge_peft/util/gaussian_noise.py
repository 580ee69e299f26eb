"""Gaussian noise from a seed, for simulations, or from the operating system's generator.

Seeded noise does not protect privacy: anyone can compute it from the seed, or predict it from
enough of the generator's earlier output. Noise that protects privacy comes from ``os.urandom``.
"""

from __future__ import annotations

import math
import os

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_CHUNK = 1 << 20
"""Limit on the numbers that are drawn at a time, to bound memory."""


def add_noise(values: Tensor, deviation: float, seed: int | None) -> Tensor:
    """Return values plus independent noise N(0, σ²).

    Args:
        values: Any shape, on the CPU.
        deviation: σ.
        seed: Seed of a simulation. None draws from the operating system. The sum is then computed
            in float64 and rounded once, so that the last digits of the result do not reveal the
            value without noise (Mironov 2012, CCS).
    """
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        return values + deviation * torch.randn(values.shape, generator=generator)
    noise = torch.from_numpy(secret_normal(values.numel())).reshape(values.shape)
    return (values.double() + deviation * noise).to(values.dtype)


def secret_normal(count: int) -> NDArray[np.float64]:
    """Draw standard normal numbers ``(count,)`` from the operating system's generator.

    Method of Box and Muller (1958): √(−2 ln u) · (cos 2πv, sin 2πv), u in (0, 1], v in [0, 1).
    """
    drawn = np.empty(count)
    for start in range(0, count, _CHUNK):
        part = drawn[start : start + _CHUNK]
        pairs = -(-len(part) // 2)
        bits = np.frombuffer(os.urandom(16 * pairs), dtype=np.uint64) >> np.uint64(11)
        uniform = bits.astype(np.float64)
        radius = np.sqrt(-2.0 * np.log((uniform[:pairs] + 1.0) / 2.0**53))
        angle = (2.0 * math.pi / 2.0**53) * uniform[pairs:]
        both = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
        part[:] = both[: len(part)]
    return drawn
