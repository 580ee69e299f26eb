"""Client-level differential privacy with Gaussian noise.

Source: McMahan et al. 2018, arXiv 1710.06963. See docs/privacy.md.
"""

from __future__ import annotations

from torch import Tensor

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.strategies.aggregation import Aggregator, clipped
from fedmerge_peft.training.update_privacy import UpdatePrivacy
from fedmerge_peft.util.extras import install_command
from fedmerge_peft.util.gaussian_noise import add_noise
from fedmerge_peft.util.gaussian_privacy import epsilon_of
from fedmerge_peft.util.seeds import derive

_EPSILON_ERROR = 0.01
"""Largest error of the accountant's estimate of ε for sampled mechanisms. The accountant adds it to
the estimate to obtain an upper bound."""


def update_privacy(recipe: PrivacyRecipe) -> UpdatePrivacy | None:
    """Return the clipping and noise that clients apply to an update before they send it.

    With ``mode: local``, σ = z · 2 C, because clipped updates are at most 2 C apart. With
    ``mode: central``, clients add no noise. With ``mode: none``, the result is None.
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

        Δ_j = Σ_i w_ij clip(δ_i) / D_j + N(0, (z S)²)
        D_j = max(K/d, Σ_i w_ij) and S = 2 C d / K for d > 1,    D_j = K and S = C / K for d = 1

    The removal of client i moves Δ_j by at most 2 C w_ij d/K (McMahan et al. 2018, lemma 1, for
    each j). It moves all Δ_j together by at most 2 C ‖w_i‖₂ d/K ≤ S, because Σ_j w_ij ≤ 1. With
    d = 1 the denominator does not depend on the replies, and half of this bound suffices.
    """

    def __init__(self, recipe: PrivacyRecipe, cohort_size: float, seed: int | None) -> None:
        """Create an aggregator.

        Args:
            recipe: Clipping norm C and noise multiplier z.
            cohort_size: K, or its mean if clients are drawn independently.
            seed: Seed of a simulation's noise. The noise also depends on the number of the round.
                None draws noise from the operating system's generator.
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
        totals = weights.sum(dim=0).clamp_min(self.cohort_size / adapters)
        shares = weights / (totals if adapters > 1 else self.cohort_size)
        exact = shares.T.to(deltas) @ clipped(deltas, self.bound)
        seed = None if self.seed is None else derive(self.seed, "noise", len(self.norms))
        return add_noise(exact, self.privacy.noise * self.sensitivity(adapters), seed)


def epsilon_spent(recipe: PrivacyRecipe, releases: int, rate: float = 1.0) -> float:
    """Compute ε at the recipe's δ for a client after this number of releases.

    Each release is a Gaussian mechanism with noise multiplier z, so all releases together are μ-GDP
    with μ² = releases / z² (``util.gaussian_privacy``). If each round draws a secret Poisson
    sample, opacus's accountant composes the privacy loss distributions of the sampled mechanism
    (Gopi et al. 2021, arXiv 2106.02848). The result is then the smaller of two numbers: ε from
    μ-GDP, and the accountant's upper bound.

    Args:
        recipe: Noise and δ.
        releases: Number of rounds in which the client took part. With a rate below 1, the number of
            all rounds.
        rate: Probability with which a client is drawn for a round, if the sample is secret.

    Raises:
        RecipeError: The rate is below 1, and the extra ``privacy`` is not installed.
    """
    mu = 1 / recipe.noise
    exact = epsilon_of(releases * mu * mu, recipe.delta)
    if rate == 1 or releases == 0:
        return exact
    try:
        from opacus.accountants import PRVAccountant
    except ImportError as error:
        raise RecipeError(
            "clients.sampling: poisson with privacy needs opacus to compute epsilon: "
            + install_command("privacy")
        ) from error
    accountant = PRVAccountant()
    accountant.history = [(recipe.noise, rate, releases)]
    return min(exact, float(accountant.get_epsilon(recipe.delta, eps_error=_EPSILON_ERROR)))
