"""Choice of a learning rate from the losses of a range test.

ρ is a table of losses relative to each client's start, rates × clients. The rates ascend; a failure
has the value inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def lowest(ratios: NDArray[np.float64]) -> int:
    """Return the index of the row with the lowest mean; in a tie, the first index.

    Args:
        ratios: ρ, rates × clients, the rates ascending; inf for a failure.
    """
    return int(ratios.mean(axis=1).argmin())


def smallest_tied(ratios: NDArray[np.float64], best: int) -> int:
    """Return the index of the smallest rate within one standard error of the best rate.

    Means over the clients are compared, with the standard error of the mean paired difference
    ρ_ir − ρ_i,best, which is 0 for one client. This is the one-standard-error rule (Breiman et al.
    1984, Classification and Regression Trees, section 3.4.3). The smaller rate is preferred,
    because a rate that is too large diverges later, while one that is slightly too small only needs
    more rounds.

    Args:
        ratios: As for ``lowest``.
        best: Index of the best rate.
    """
    for row in range(best):
        differences = ratios[row] - ratios[best]
        if np.isfinite(differences).all() and differences.mean() <= _standard_error(differences):
            return row
    return best


def below_lowest(rates: Sequence[float], ratios: NDArray[np.float64]) -> float:
    """Return the rate one step below the rate with the lowest training loss (Smith 2017, 3.3).

    If the training loss is lowest at the smallest rate, return the smallest rate.

    Args:
        rates: Rates, ascending.
        ratios: ρ of the training loss, as for ``lowest``.
    """
    return rates[max(lowest(ratios) - 1, 0)]


def reduces_loss(ratios: NDArray[np.float64]) -> bool:
    """Return True if a rate reduces the clients' loss by more than two standard errors.

    Args:
        ratios: ρ at this rate, one number for each client.
    """
    return bool(np.isfinite(ratios).all() and (1 - ratios).mean() > 2 * _standard_error(ratios))


def _standard_error(values: NDArray[np.float64]) -> float:
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0
