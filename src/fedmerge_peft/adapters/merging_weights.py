"""The merging weights: which client is made of which adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fedmerge_peft.util.stateful import Stateful

UNUSED_SHARE = 0.25
"""An adapter counts as unused below this part of an even share of the clients' weight."""


@dataclass
class MergingWeights(Stateful):
    """W: one row of logits a client; π = softmax(W) over adapters (arXiv 2504.06768)."""

    state_fields: ClassVar[tuple[str, ...]] = ("logits",)

    logits: Tensor
    """``(clients, adapters)``, float32; zeros are the uniform start."""

    @classmethod
    def uniform(cls, clients: int, adapters: int) -> MergingWeights:
        """Every client made of all adapters alike."""
        return cls(torch.zeros(clients, adapters))

    def softmax(self) -> Tensor:
        """π, ``(clients, adapters)``; rows sum to 1."""
        return torch.softmax(self.logits, dim=1)


def entropy(weights: Tensor) -> float:
    """Mean entropy of the rows of π ``(clients, d)``, in units of log d: 1 is uniform, 0 is one adapter a client.

    With d = 1 there is nothing to choose, and the value is 0.
    """
    if weights.shape[1] < 2:
        return 0.0
    nats = torch.special.entr(weights.double()).sum(dim=1)
    return float(nats.mean()) / math.log(weights.shape[1])


def adapter_shares(weights: Tensor) -> list[float]:
    """Each adapter's share of all clients' weight, ``(d,)``; sums to 1, and 1/d each is the uniform start."""
    return [float(share) for share in weights.double().mean(dim=0)]


def weight_warnings(weights: Tensor) -> list[str]:
    """What a person should know about π: weights that have not moved, adapters that nobody uses."""
    adapters = weights.shape[1]
    if adapters < 2:
        return []
    if float((weights - 1 / adapters).abs().max()) < 0.01:
        return [
            "the merging weights have not moved from uniform: all clients get the same adapter. "
            "Raise strategy.weights_lr, or use strategy.rule=normalized"
        ]
    return unused_warning(weights)


def unused_warning(weights: Tensor) -> list[str]:
    """Which adapters nobody uses, as one warning; empty where all are in use."""
    adapters = weights.shape[1]
    idle = [
        str(adapter)
        for adapter, share in enumerate(adapter_shares(weights))
        if share < UNUSED_SHARE / adapters
    ]
    if not idle:
        return []
    who = "adapters {} of {} stand" if len(idle) > 1 else "adapter {} of {} stands"
    return [
        f"{who.format(', '.join(idle), adapters)} unused (less than a quarter of an even share of the clients' weight)"
    ]
