"""How the updates of several clients become one, when some of them may be hostile.

Every strategy that averages does so through an ``Aggregator``: δ_i are the updates, q_ij ≥ 0 what client i's counts for adapter j, and
Δ_j = Q_j · A(δ, q_j / Q_j) with Q_j = Σ_i q_ij, mostly 1. The weights w = q_j / Q_j sum to 1. A is one of:

mean           Σ_i w_i δ_i. One client can move it anywhere.
median         in each coordinate the weighted median: at most half of the weight is on either side of it; the middle of two such.
trimmed_mean   in each coordinate the weighted mean of what is left when the lowest and the highest part β of the weight is cut off.
krum           δ_i of the client whose n − f − 2 nearest others are nearest, by the sum of squared distances.
multi_krum     the weighted mean of the n − f clients for which that sum is smallest.
cosine_filter  the weighted mean of the clients with cos(δ_i, Σ_i'≠i w_i' δ_i' / ‖δ_i'‖) > 0: all others have a vote of length 1 on where
               to go, and who goes against it is left out.

Median and trimmed mean: Yin et al. 2018, arXiv 1803.01498, definitions 1 and 2, of which these are the weighted forms (equal weights give
theirs). Krum: Blanchard et al. 2017, arXiv 1703.02757; it has no weights, so n counts the clients that use an adapter, those with at
least half of an even share of its weight, and f is a part of these. Below three users nobody can be outvoted, and it is their mean.
The filter is FLTrust's (Cao et al. 2021, arXiv 2012.13995, algorithm 2), which trusts nobody whose direction is against that of an update
from data of the server's own; here, where the server has none, the adapter's other users are asked. Who agrees counts in full: clients
that differ are no worse.

Before that, updates are clipped: δ_i ← δ_i · min(1, C / ‖δ_i‖₂) (Sun et al. 2019, arXiv 1911.07963), so that client i moves Θ_j by no more
than η q_ij C with the mean. C is fixed, or a multiple of the running median of the norms, which no minority of clients decides.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from fedmerge_peft.plugins import AGGREGATIONS
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies.server_step import soup_shares
from fedmerge_peft.strategies.similarity import cosines
from fedmerge_peft.util.vectors import row_norms

_REMEMBERED = 5
"""Rounds that the running median of the norms is over."""
_USES = 0.5
"""Part of an even share of an adapter's weight from which on a client counts as one of its users."""
_COLUMNS = 1 << 16
"""Columns that are sorted at a time, to bound memory."""


class Aggregator:
    """One federation's rule. A strategy clips a round's updates once, then combines them as often as it has adapters."""

    def __init__(self, recipe: RobustnessRecipe | None = None) -> None:
        self.recipe = recipe or RobustnessRecipe()
        self.norms: list[float] = []
        """Median ‖δ_i‖₂ of each round so far; the running median follows from them, so a run goes on with those of its records."""
        self.lengths = torch.empty(0)
        """‖δ_i‖₂ of the updates that were clipped last, as they are now, ``(k,)``, to a millionth or so: a pass over all replies."""

    def clip(self, deltas: Tensor) -> Tensor:
        """A round's updates ``(k, P)``, none longer than C; to be called once a round."""
        found = row_norms(deltas)
        self.norms.append(float(found.median()))
        self.lengths = found.clamp_max(self.bound)
        return clipped(deltas, self.bound, found)

    @property
    def bound(self) -> float:
        """C in this round, L2; infinite where nothing is clipped."""
        running = statistics.median(self.norms[-_REMEMBERED:]) if self.norms else 0.0
        multiple = (
            math.inf if self.recipe.norm_multiple is None else self.recipe.norm_multiple * running
        )
        return min(multiple, math.inf if self.recipe.norm_bound is None else self.recipe.norm_bound)

    def combine(
        self, deltas: Tensor, weights: Tensor, sizes: Tensor, *, normalize: bool = True
    ) -> Tensor:
        """Δ ``(d, P)``, zero for an adapter that nobody uses.

        Args:
            deltas: δ, ``(k, P)``.
            weights: π ≥ 0, what each client counts for each adapter beside its size, ``(k, d)``.
            sizes: n, ``(k,)``, any unit.
            normalize: q_ij = π_ij n_i / Σ_i' π_i'j n_i', so that Q_j = 1; or else q_ij = π_ij n_i / n.
        """
        shares = (sizes / sizes.sum()).double()
        mixing = soup_shares(weights, shares) if normalize else weights.double() * shares[:, None]
        if self.recipe.aggregation == "mean":
            return mixing.T.to(deltas) @ deltas
        totals = mixing.sum(dim=0)
        counted = mixing / totals.clamp_min(torch.finfo(torch.float64).tiny)
        found: Tensor = AGGREGATIONS[self.recipe.aggregation].load()(deltas, counted, self.recipe)
        return totals[:, None].to(deltas) * found


# --------------------------------------------------------------------------------------------------
# The rules, by their names in recipes: δ (k, P) and weights (k, d), whose columns sum to 1 or are
# zero, to one update for each adapter, (d, P)
# --------------------------------------------------------------------------------------------------
def mean(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean."""
    return weights.T.to(deltas) @ deltas


def median(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Coordinate-wise weighted median."""
    return trimmed_means(deltas, weights, 0.5)


def trimmed_mean(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Coordinate-wise weighted mean without ``recipe.trim`` of the weight at each end."""
    return trimmed_means(deltas, weights, recipe.trim)


def krum(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """The one update nearest to its neighbours, for each adapter."""
    return _nearest(deltas, weights, recipe.malicious, several=False)


def multi_krum(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean of the updates nearest to their neighbours, for each adapter."""
    return _nearest(deltas, weights, recipe.malicious, several=True)


def cosine_filter(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean of the updates that do not point against the others', for each adapter."""
    between = cosines(deltas, torch.zeros(1, 1).expand(1, deltas.shape[1]))
    return torch.stack([agreeing(between, column) for column in weights.T]).to(deltas) @ deltas


def _nearest(deltas: Tensor, weights: Tensor, malicious: float, several: bool) -> Tensor:
    kept = [krum_weights(deltas, column, malicious, several) for column in weights.T]
    return torch.stack(kept).to(deltas) @ deltas


# --------------------------------------------------------------------------------------------------
# Their arithmetic
# --------------------------------------------------------------------------------------------------
def clipped(deltas: Tensor, bound: float, known: Tensor | None = None) -> Tensor:
    """δ_i · min(1, bound / ‖δ_i‖₂), ``(k, P)``; what is short enough stays, bit for bit. ``known``: ‖δ_i‖₂, where they are."""
    if math.isinf(bound):
        return deltas
    found = (row_norms(deltas) if known is None else known)[:, None]
    shorter = (deltas * (bound / found.clamp_min(torch.finfo(torch.float64).tiny))).to(deltas)
    return torch.where(found > bound, shorter, deltas)


def trimmed_means(deltas: Tensor, weights: Tensor, trim: float) -> Tensor:
    """In each coordinate, the weighted mean without the lowest and the highest ``trim`` of the weight, ``(d, P)``; 0.5 is the median.

    Args:
        deltas: ``(k, P)``.
        weights: ``(k, d)`` float64; columns sum to 1, or are zero, which gives zeros.
        trim: β, from 0 to 0.5.
    """
    return torch.cat(
        [_trimmed_means(part, weights, trim) for part in torch.split(deltas, _COLUMNS, dim=1)],
        dim=1,
    )


def _trimmed_means(deltas: Tensor, weights: Tensor, trim: float) -> Tensor:
    values, order = deltas.sort(dim=0)
    found = []
    for column in weights.T:
        own = column[order]  # (k, P), in the order of each coordinate
        above = own.cumsum(dim=0)
        if trim == 0.5:
            # weights that meet the half exactly, but for rounding, have the middle of two
            slack = 8 * len(own) * torch.finfo(torch.float64).eps
            low, high = (
                (above < 0.5 + shift).sum(dim=0, keepdim=True).clamp_max(len(own) - 1)
                for shift in (-slack, slack)
            )
            found.append(
                ((values.gather(0, low) + values.gather(0, high)) / 2)[0] * float(column.any())
            )
        else:
            kept = above.clamp(trim, 1 - trim) - (above - own).clamp(trim, 1 - trim)
            found.append(((kept * values).sum(dim=0) / (1 - 2 * trim)).to(deltas))
    return torch.stack(found)


def krum_weights(deltas: Tensor, weights: Tensor, malicious: float, several: bool) -> Tensor:
    """What (multi-)Krum keeps of each client's update: weights ``(k,)`` that sum to 1, or to 0 where those given do.

    Args:
        deltas: ``(k, P)``.
        weights: ``(k,)`` float64; sums to 1, or is zero.
        malicious: f as a part of the users.
        several: Keep the n − f best by their weights, instead of the one best.
    """
    users = _users(weights)
    if (count := len(users)) > 2:
        hostile = math.floor(malicious * count)
        theirs = deltas[users].double()
        squares = torch.cdist(theirs, theirs, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = squares.sort(dim=1).values[
            :, 1 : 1 + max(1, count - hostile - 2)
        ]  # without itself
        users = users[nearest.sum(dim=1).argsort(stable=True)[: count - hostile if several else 1]]
    kept = torch.zeros_like(weights)
    kept[users] = weights[users]
    return kept / kept.sum().clamp_min(torch.finfo(torch.float64).tiny)


def agreeing(between: Tensor, weights: Tensor) -> Tensor:
    """What the filter keeps of each client's update: weights ``(k,)`` that sum to 1, or to 0 where those given do.

    Args:
        between: Cosines of each two updates, ``(k, k)`` float64.
        weights: ``(k,)`` float64; sums to 1, or is zero.
    """
    users = _users(weights)
    if len(users) < 3:
        return weights
    votes = torch.zeros_like(weights)
    votes[users] = weights[users]
    others = between @ votes - between.diagonal() * votes
    kept = torch.where(others > 0, weights, 0.0)
    return kept / kept.sum().clamp_min(torch.finfo(torch.float64).tiny)


def _users(weights: Tensor) -> Tensor:
    """Indices of the clients that use an adapter, by their weights ``(k,)``, which sum to 1 or 0."""
    return torch.nonzero(weights * len(weights) >= _USES).flatten()
