"""Merging weights: coefficients of each client's convex combination of adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.util.checked import damaged, read_tensors
from fedmerge_peft.util.stateful import Stateful

UNUSED_SHARE = 0.25
"""Fraction of the uniform share 1/d below which an adapter counts as unused."""


@dataclass
class MergingWeights(Stateful):
    """Logits W of the merging weights π = softmax(W) over adapters (arXiv 2504.06768)."""

    state_fields: ClassVar[tuple[str, ...]] = ("logits",)

    logits: Tensor
    """W, ``(clients, adapters)``, float32. Zeros give uniform weights."""

    @classmethod
    def uniform(cls, clients: int, adapters: int) -> MergingWeights:
        """Create uniform weights: π_ij = 1 / adapters."""
        return cls(torch.zeros(clients, adapters))

    def softmax(self) -> Tensor:
        """Return π, ``(clients, adapters)``, whose rows sum to 1."""
        return torch.softmax(self.logits, dim=1)


def read_weights(path: Path) -> Tensor:
    """Read the weights π ``(clients, adapters)`` from a file of a run.

    Raises:
        RunError: The file is missing or damaged.
    """
    tensors, _ = read_tensors(path)
    weights = tensors.get("weights")
    if weights is None or weights.ndim != 2 or not weights.is_floating_point():
        raise damaged(path, "it has no weights")
    if not bool(weights.isfinite().all()) or weights.numel() == 0:
        raise damaged(path, "its weights are empty or not finite")
    return weights


def entropy(weights: Tensor) -> float:
    """Compute the mean entropy of the rows of π ``(clients, d)``, in units of log d.

    The entropy is 1 for uniform weights, and 0 for one-hot weights or d = 1.
    """
    if weights.shape[1] < 2:
        return 0.0
    nats = torch.special.entr(weights.double()).sum(dim=1)
    return float(nats.mean()) / math.log(weights.shape[1])


def adapter_shares(weights: Tensor) -> list[float]:
    """Compute each adapter's share of the total weight in π ``(clients, d)``, as d floats."""
    return [float(share) for share in weights.double().mean(dim=0)]


def weight_warnings(weights: Tensor) -> list[str]:
    """Return warnings if π ``(clients, d)`` is uniform (to 0.01) or some adapters are unused."""
    adapters = weights.shape[1]
    if adapters < 2:
        return []
    if float((weights - 1 / adapters).abs().max()) < 0.01:
        return [
            "the merging weights are still uniform (to 0.01): all clients get nearly the same "
            "merged adapter. "
            "Raise strategy.weights_lr, or use strategy.rule=normalized if another rule is set"
        ]
    return unused_warning(weights)


def unused_warning(weights: Tensor) -> list[str]:
    """Return a list with a warning if some adapters of π ``(clients, d)`` are unused, else []."""
    adapters = weights.shape[1]
    idle = [
        str(adapter)
        for adapter, share in enumerate(adapter_shares(weights))
        if share < UNUSED_SHARE / adapters
    ]
    if not idle:
        return []
    noun, verb, whose = ("adapters", "are", "their") if len(idle) > 1 else ("adapter", "is", "its")
    return [
        f"{noun} {', '.join(idle)} (numbered from 0) {verb} unused: {whose} mean merging weight "
        f"over the clients is below a quarter of 1/{adapters}"
    ]
