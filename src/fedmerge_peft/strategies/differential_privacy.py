"""Client-level differential privacy with Gaussian noise (McMahan et al. 2018, arXiv 1710.06963; docs/privacy.md)."""

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
"""Orders α at which Rényi differential privacy is looked at: opacus's own, and more on either side for little and for much noise."""


def update_privacy(recipe: PrivacyRecipe) -> UpdatePrivacy | None:
    """What clients do to an update before they send it; with ``mode: local``, σ = z · 2 C, as clipped updates are at most 2 C apart."""
    if recipe.mode == "none":
        return None
    return UpdatePrivacy(
        recipe.clip, 2 * recipe.noise * recipe.clip if recipe.mode == "local" else 0.0
    )


class PrivateAggregator(Aggregator):
    """Noise on the sums. With w_ij ∈ [0, 1] what client i counts for adapter j (π_ij; 1 for FedAvg), all clients' sizes alike, and K asked,

        Δ_j = Σ_i w_ij clip(δ_i) / max(K/d, Σ_i w_ij) + N(0, (z S)²),    S = 2 C d / K, and C / K where d = 1.

    Without client i this moves by no more than 2 C w_ij d/K (McMahan et al. 2018, lemma 1, for each j), so all of it together by
    2 C ‖w_i‖₂ d/K ≤ S, as Σ_j w_ij ≤ 1. With d = 1 the denominator is K whoever replies, and half of that is enough.
    """

    def __init__(self, recipe: PrivacyRecipe, asked: int, seed: int) -> None:
        """``asked`` is K; a round's noise comes from ``seed`` and the number of rounds before it."""
        super().__init__()
        self.privacy = recipe
        self.asked = asked
        self.seed = seed

    @property
    def bound(self) -> float:
        return self.privacy.clip

    def sensitivity(self, adapters: int) -> float:
        """S, L2, for a soup of so many adapters."""
        return (1 if adapters == 1 else 2 * adapters) * self.privacy.clip / self.asked

    def combine(
        self, deltas: Tensor, weights: Tensor, sizes: Tensor, *, normalize: bool = True
    ) -> Tensor:
        weights = weights.double()
        adapters = weights.shape[1]
        shares = weights / weights.sum(dim=0).clamp_min(self.asked / adapters)
        exact = shares.T.to(deltas) @ clipped(deltas, self.bound)
        generator = torch.Generator().manual_seed(derive(self.seed, "noise", len(self.norms)))
        return exact + self.privacy.noise * self.sensitivity(adapters) * torch.randn(
            exact.shape, generator=generator
        )


def epsilon_spent(recipe: PrivacyRecipe, rounds: int) -> float:
    """ε at the recipe's δ for a client that took part in so many rounds, by opacus's accountant of Rényi differential privacy.

    Each of its rounds is one Gaussian mechanism of noise multiplier z. That cohorts are drawn at random is not counted in the
    client's favour, as who knows the seed knows them.

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
                "privacy.mode: needs opacus to count what is spent: pip install 'fedmerge-peft[privacy]'"
            ]
        ) from error
    accountant = RDPAccountant()
    accountant.history = [(recipe.noise, 1.0, rounds)]
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # of orders that a finer list would beat: what is found is a bound with any list
        return float(accountant.get_epsilon(recipe.delta, alphas=_ORDERS))
