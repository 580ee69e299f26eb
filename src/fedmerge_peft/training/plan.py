"""What a client is asked to do with what it was sent.

Most methods ask for one thing, to train one adapter; the others choose one of several first, train two in turn, or train a mixture.
A plan is data: engines decide how it is carried out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class UpdatePrivacy:
    """What a client does to an update before it sends it: δ · min(1, clip / ‖δ‖₂), plus Gaussian noise, in the columns that trained."""

    clip: float
    """L2."""
    noise: float
    """Standard deviation of each number's noise; 0 for none."""


@dataclass(frozen=True)
class Train:
    """Train one adapter on the client's examples: min_θ ℓ(θ) + μ ‖θ − anchor‖²."""

    row: Tensor
    """θ as sent, ``(P,)``."""
    phases: tuple[Tensor | None, ...] = (None,)
    """One pass of local training for each: the columns that train in it, a mask ``(P,)``; None for all."""
    proximal: float | None = None
    """μ; None for the recipe's ``training.proximal``."""
    anchor: Tensor | None = None
    """``(P,)``; None for the row itself."""
    example_weights: Tensor | None = None
    """What each of the client's training examples counts, ``(n,)``; None for 1."""
    privacy: UpdatePrivacy | None = None
    """What is done to the update before it leaves the client; None to send it as it is. What the client keeps is not touched."""

    @property
    def sent(self) -> Tensor:
        return self.row[None]


@dataclass(frozen=True)
class InTurn:
    """Train several adapters, one after another, each from its own row. The first is the one that is shared."""

    jobs: tuple[Train, ...]

    @property
    def sent(self) -> Tensor:
        return torch.stack([job.row for job in self.jobs])


@dataclass(frozen=True)
class Choose:
    """Train the adapter that has the lowest loss on the client's training examples, as it stands."""

    rows: Tensor
    """``(d, P)``."""

    @property
    def sent(self) -> Tensor:
        return self.rows


@dataclass(frozen=True)
class Mixture:
    """p(y | x) = Σ_k π_k p_k(y | x). As a plan: one step of EM on the client's training examples (FedEM)."""

    rows: Tensor
    """The components, ``(d, P)``."""
    weights: Tensor
    """π, ``(d,)``; sums to 1."""

    @property
    def sent(self) -> Tensor:
        return self.rows


Plan = Train | InTurn | Choose | Mixture

Served = Tensor | Mixture
"""What a client predicts with: one adapter ``(P,)``, or a mixture of several."""
