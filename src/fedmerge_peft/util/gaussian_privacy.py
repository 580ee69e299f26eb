"""Privacy loss of Gaussian mechanisms, without approximation.

A mechanism that adds N(0, σ²) to a vector of L2 sensitivity S is μ-GDP with μ = S / σ. The
composition of several such mechanisms, even if adaptive, is μ-GDP with μ² = Σ_k μ_k² (Dong, Roth
and Su 2022, arXiv 1905.02383, corollary 3.3). μ-GDP is equivalent to (ε, δ(ε))-DP for all ε ≥ 0,
with

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε Φ(−μ/2 − ε/μ)         (Balle and Wang 2018, arXiv 1805.06530)
"""

from __future__ import annotations

import math

from scipy.special import log_ndtr

_STEPS = 200
"""Number of bisection steps, more than a float has bits."""


def epsilon_of(mu_squared: float, delta: float) -> float:
    """Return the smallest ε at δ for a total of Σ_k μ_k²; infinite if the total is infinite.

    Args:
        mu_squared: Σ_k (S_k / σ_k)².
        delta: δ, between 0 and 1.
    """
    if mu_squared == 0 or not math.isfinite(mu_squared):
        return mu_squared
    low, high = 0.0, mu_squared / 2 + math.sqrt(2 * mu_squared * math.log(1 / delta))
    if delta_of(0.0, mu_squared) <= delta:
        return 0.0
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if delta_of(middle, mu_squared) > delta else (low, middle)
    return high


def delta_of(epsilon: float, mu_squared: float) -> float:
    """Return δ(ε) for a total of Σ_k μ_k² > 0."""
    mu = math.sqrt(mu_squared)
    first = float(log_ndtr(mu / 2 - epsilon / mu))
    second = epsilon + float(log_ndtr(-mu / 2 - epsilon / mu))
    return math.exp(first) - math.exp(second) if second < first else 0.0
