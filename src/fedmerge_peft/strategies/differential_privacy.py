"""Client-level differential privacy with Gaussian noise.

Source: McMahan et al. 2018, arXiv 1710.06963. See docs/privacy.md.
"""

from __future__ import annotations

from torch import Tensor

from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.strategies.aggregation import Aggregator, clipped
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.gaussian_noise import add_noise
from fedmerge_peft.util.gaussian_privacy import epsilon_of
from fedmerge_peft.util.seeds import derive


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

    def __init__(self, recipe: PrivacyRecipe, cohort_size: int, seed: int | None) -> None:
        """Create an aggregator.

        Args:
            recipe: Clipping norm C and noise multiplier z.
            cohort_size: K.
            seed: Seed of a simulation's noise, which also depends on the number of previous rounds.
                None for the operating system's generator.
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
        seed = None if self.seed is None else derive(self.seed, "noise", len(self.norms))
        return add_noise(exact, self.privacy.noise * self.sensitivity(adapters), seed)


def epsilon_spent(recipe: PrivacyRecipe, releases: int) -> float:
    """Compute ε at the recipe's δ for a client with this number of releases.

    Each is one Gaussian mechanism of noise multiplier z, so that together they are μ-GDP with
    μ² = releases / z² (``util.gaussian_privacy``). Random cohorts bring no amplification, because
    the cohorts follow from the seed.
    """
    mu = 1 / recipe.noise
    return epsilon_of(releases * mu * mu, recipe.delta)
