"""Client-level differential privacy with Gaussian noise.

Source: McMahan et al. 2018, arXiv 1710.06963. See docs/privacy.md.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.strategies.aggregation import Aggregator, clipped
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.seeds import derive

_ORDERS = [
    1.01,
    1.05,
    *(1 + order / 10 for order in range(1, 100)),
    *range(12, 64),
    80,
    128,
    256,
    512,
    1024,
]
"""Orders α of Rényi differential privacy: opacus's defaults, extended for low and high noise."""


def update_privacy(recipe: PrivacyRecipe) -> UpdatePrivacy | None:
    """Return the clipping and noise that clients apply to an update before they send it.

    With ``mode: local``, σ = z · 2 C, because clipped updates are at most 2 C apart.
    """
    if recipe.mode == "none":
        return None
    return UpdatePrivacy(
        recipe.clip, 2 * recipe.noise * recipe.clip if recipe.mode == "local" else 0.0
    )


class PrivateAggregator(Aggregator):
    """Aggregator that adds Gaussian noise to sums of clipped updates.

    Let w_ij ∈ [0, 1] be the weight of client i for adapter j (π_ij; 1 for FedAvg), let all clients
    have equal size, and let K be the cohort size:

        Δ_j = Σ_i w_ij clip(δ_i) / max(K/d, Σ_i w_ij) + N(0, (z S)²)
        S = 2 C d / K for d > 1,    S = C / K for d = 1

    Removing client i moves Δ_j by at most 2 C w_ij d/K (McMahan et al. 2018, lemma 1, for each j).
    It moves all Δ_j together by at most 2 C ‖w_i‖₂ d/K ≤ S, because Σ_j w_ij ≤ 1. With d = 1 the
    denominator is K for any set of replies, and half of this bound suffices.
    """

    def __init__(self, recipe: PrivacyRecipe, cohort_size: int, seed: int) -> None:
        """Create an aggregator.

        Args:
            recipe: Clipping norm C and noise multiplier z.
            cohort_size: K.
            seed: Seed of the noise. The number of previous rounds also enters each round's noise.
        """
        super().__init__()
        self.privacy = recipe
        self.cohort_size = cohort_size
        self.seed = seed

    @property
    def bound(self) -> float:
        return self.privacy.clip

    def sensitivity(self, adapters: int) -> float:
        """Return S, an L2 norm, for a soup of d adapters."""
        return (1 if adapters == 1 else 2 * adapters) * self.privacy.clip / self.cohort_size

    def combine(
        self, deltas: Tensor, weights: Tensor, sizes: Tensor, *, normalize: bool = True
    ) -> Tensor:
        weights = weights.double()
        adapters = weights.shape[1]
        shares = weights / weights.sum(dim=0).clamp_min(self.cohort_size / adapters)
        exact = shares.T.to(deltas) @ clipped(deltas, self.bound)
        generator = torch.Generator().manual_seed(derive(self.seed, "noise", len(self.norms)))
        return exact + self.privacy.noise * self.sensitivity(adapters) * torch.randn(
            exact.shape, generator=generator
        )


def epsilon_spent(recipe: PrivacyRecipe, rounds: int) -> float:
    """Compute ε at the recipe's δ for a client that took part in ``rounds`` rounds.

    Opacus's accountant of Rényi differential privacy counts each round as one Gaussian mechanism of
    noise multiplier z. Random cohorts bring no amplification, because the cohorts follow from the
    seed.

    Raises:
        RecipeError: The extra ``privacy`` is not installed.
    """
    if rounds == 0:
        return 0.0
    try:
        from opacus.accountants import RDPAccountant
    except ImportError as error:
        raise RecipeError(
            [
                "privacy.mode: opacus is required to compute epsilon: "
                "pip install 'fedmerge-peft[privacy]'"
            ]
        ) from error
    accountant = RDPAccountant()
    accountant.history = [(recipe.noise, 1.0, rounds)]
    with warnings.catch_warnings():
        # Opacus warns if further orders could give a smaller ε. Any list of orders gives a bound.
        warnings.simplefilter("ignore", UserWarning)
        return float(accountant.get_epsilon(recipe.delta, alphas=_ORDERS))
