"""Robust aggregation: clip the updates of several clients and combine them into one.

All strategies that average use an ``Aggregator``. Let δ_i be the updates and q_ij ≥ 0 the weight of
client i for adapter j. With Q_j = Σ_i q_ij (1 in most cases), the combined update is

    Δ_j = Q_j · A(δ, w),    w_i = q_ij / Q_j,    Σ_i w_i = 1

A is one of the following rules. A user of adapter j is a client whose w_i is at least half of the
uniform weight, 1 / (number of clients that replied). n is the number of users.

mean           Σ_i w_i δ_i. A single client can move it arbitrarily far.
median         Weighted median of each coordinate: at most half of the weight lies on either side.
               If two values satisfy this, the median is their midpoint.
trimmed_mean   Weighted mean of each coordinate after the lowest and the highest fraction β of the
               weight have been removed.
krum           δ_i of the user with the smallest sum of squared distances to its n − f − 2 nearest
               neighbors among the users. f is the number of users that are assumed to be malicious.
multi_krum     Weighted mean of δ_i over the n − f users with the smallest such sums.
cosine_filter  Weighted mean of δ_i over the clients with cos(δ_i, Σ_i'≠i w_i' δ_i' / ‖δ_i'‖) > 0.
               The sum runs over the users: each user votes for its direction with weight w_i'. An
               update that opposes the votes of the other users is removed.
similarity_filter  The cosine filter, except that clients whose updates are unusually similar to
               each other share one vote (``similarity_filter.py``).

Median and trimmed mean are the weighted forms of definitions 1 and 2 of Yin et al. 2018, arXiv
1803.01498; equal weights yield the original definitions. Krum is from Blanchard et al. 2017, arXiv
1703.02757. It selects among the users without regard to their weights. With fewer than three users
no user can be outvoted, and the result of the last four rules is a weighted mean.

The cosine filter follows FLTrust (Cao et al. 2021, arXiv 2012.13995, algorithm 2). FLTrust removes
updates whose direction opposes an update from the server's own data. If the server has no data, as
here, the other users of the adapter provide the reference. Unlike in FLTrust, the remaining updates
keep their full weight, because updates of honest clients may differ as well.

Updates are clipped first: δ_i ← δ_i · min(1, C / ‖δ_i‖₂) (Sun et al. 2019, arXiv 1911.07963). With
the mean, client i then moves Θ_j by at most η q_ij C. C is fixed, or a multiple of the running
median of the norms, which a minority of clients cannot control. If the recipe sets both, C is the
smaller value.
"""

from __future__ import annotations

import math
import statistics

import torch
from torch import Tensor

from fedmerge_peft.errors import PluginError
from fedmerge_peft.plugins import AGGREGATIONS
from fedmerge_peft.recipe.robustness import RobustnessRecipe
from fedmerge_peft.strategies.server_step import soup_shares
from fedmerge_peft.strategies.similarity import cosines
from fedmerge_peft.util.vectors import row_norms, tensor_mismatch

_NORM_WINDOW = 5
"""Number of rounds in the running median of the norms."""
_MIN_USER_SHARE = 0.5
"""Smallest weight of a user, as a fraction of the uniform weight of the clients that replied."""
_SORT_COLUMNS = 1 << 16
"""Number of columns that are sorted at a time, to bound memory."""


class Aggregator:
    """Aggregation rule of one federation.

    In each round a strategy calls ``clip`` once and ``combine`` as often as it needs.
    """

    def __init__(self, recipe: RobustnessRecipe | None = None) -> None:
        self.recipe = recipe or RobustnessRecipe()
        self.norms: list[float] = []
        """Median of ‖δ_i‖₂ in each round so far. A resumed run restores it from its records."""
        self.update_norms = torch.empty(0)
        """‖δ_i‖₂ of this round's updates after clipping, ``(k,)`` float64, with relative error
        10⁻⁶."""

    def clip(self, deltas: Tensor) -> Tensor:
        """Clip a round's updates ``(k, P)`` to L2 norm C. Call this once per round."""
        norms = row_norms(deltas)
        self.norms.append(float(norms.median()))
        self.update_norms = norms.clamp_max(self.bound)
        return clipped(deltas, self.bound, norms)

    @property
    def bound(self) -> float:
        """C in this round, an L2 norm; infinite without clipping."""
        running = statistics.median(self.norms[-_NORM_WINDOW:]) if self.norms else 0.0
        multiple = (
            math.inf if self.recipe.norm_multiple is None else self.recipe.norm_multiple * running
        )
        return min(multiple, math.inf if self.recipe.norm_bound is None else self.recipe.norm_bound)

    def votes(self, sizes: Tensor) -> Tensor:
        """Return the clients' votes ``(k,)``: their sizes n, and with a defense at most the median.

        A defense is clipping, or any rule other than the mean. The server cannot verify the number
        of examples that a client declares. Without a defense, a client can therefore outvote all
        others. As long as most clients declare their true sizes, the median is at most the largest
        true size.
        """
        return sizes.clamp_max(sizes.median()) if self.recipe.defends else sizes

    def combine(
        self, deltas: Tensor, weights: Tensor, sizes: Tensor, *, normalize: bool = True
    ) -> Tensor:
        """Combine updates into Δ ``(d, P)``; a row is zero if all weights of its adapter are zero.

        Args:
            deltas: δ, ``(k, P)``.
            weights: π ≥ 0, the weight of each client for each adapter, ``(k, d)``, to be multiplied
                by the client's size.
            sizes: n, ``(k,)``, in any unit. They are first replaced by the result of ``votes``.
            normalize: If True, q_ij = π_ij n_i / Σ_i' π_i'j n_i', so that Q_j = 1. Otherwise
                q_ij = π_ij n_i / Σ_i' n_i'.

        Raises:
            PluginError: A plugin's rule fails, or its result has the wrong shape or is not finite.
        """
        votes = self.votes(sizes)
        shares = (votes / votes.sum()).double()
        mixing = soup_shares(weights, shares) if normalize else weights.double() * shares[:, None]
        if self.recipe.aggregation == "mean":
            return mixing.T.to(deltas) @ deltas
        totals = mixing.sum(dim=0)
        normalized = mixing / totals.clamp_min(torch.finfo(torch.float64).tiny)
        entry = AGGREGATIONS[self.recipe.aggregation]
        with entry.named_in_errors("aggregation rule"):
            combined: Tensor = entry.load()(deltas, normalized, self.recipe)
        shape = (weights.shape[1], deltas.shape[1])
        if entry.origin != "built-in" and (mismatch := tensor_mismatch(combined, shape)):
            raise PluginError(
                f"the aggregation rule {entry.name!r} of {entry.module}: its result is {mismatch}"
            )
        return totals[:, None].to(deltas) * combined


# --------------------------------------------------------------------------------------------------
# Rules, by their names in recipes. Each rule combines δ (k, P) with weights (k, d) into one update
# for each adapter, (d, P). The columns of the weights sum to 1 or are zero.
# --------------------------------------------------------------------------------------------------
def mean(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean."""
    return weights.T.to(deltas) @ deltas


def median(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Coordinate-wise weighted median."""
    return trimmed_means(deltas, weights, 0.5)


def trimmed_mean(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Coordinate-wise weighted mean after ``recipe.trim`` of the weight is removed at each end."""
    return trimmed_means(deltas, weights, recipe.trim)


def krum(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Single update that is nearest to its neighbors."""
    return _krum(deltas, weights, recipe.malicious, multiple=False)


def multi_krum(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean of the updates that are nearest to their neighbors."""
    return _krum(deltas, weights, recipe.malicious, multiple=True)


def cosine_filter(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Weighted mean of the updates that do not oppose the others."""
    similarities = cosines(deltas, torch.zeros(1, 1).expand(1, deltas.shape[1]))
    rows = [cosine_filter_weights(similarities, column) for column in weights.T]
    return torch.stack(rows).to(deltas) @ deltas


def _krum(deltas: Tensor, weights: Tensor, malicious: float, *, multiple: bool) -> Tensor:
    rows = [krum_weights(deltas, column, malicious, multiple) for column in weights.T]
    return torch.stack(rows).to(deltas) @ deltas


# ---- Arithmetic of the rules ---------------------------------------------------------------------
def clipped(deltas: Tensor, bound: float, norms: Tensor | None = None) -> Tensor:
    """Return δ_i · min(1, bound / ‖δ_i‖₂), ``(k, P)``. Rows within the bound are not changed.

    Args:
        deltas: δ, ``(k, P)``.
        bound: Largest L2 norm; may be infinite.
        norms: ‖δ_i‖₂, ``(k,)``, if known.
    """
    if math.isinf(bound):
        return deltas
    norms = (row_norms(deltas) if norms is None else norms)[:, None]
    scaled = (deltas * (bound / norms.clamp_min(torch.finfo(torch.float64).tiny))).to(deltas)
    return torch.where(norms > bound, scaled, deltas)


def trimmed_means(deltas: Tensor, weights: Tensor, trim: float) -> Tensor:
    """Compute the weighted trimmed mean of each coordinate for each adapter, ``(d, P)``.

    Args:
        deltas: ``(k, P)``.
        weights: ``(k, d)`` float64. Each column sums to 1 or is zero. A zero column yields zeros.
        trim: β, the fraction of the weight to remove at each end, from 0 to 0.5. With 0.5, the
            result is the weighted median.
    """
    return torch.cat(
        [_trimmed_means(part, weights, trim) for part in torch.split(deltas, _SORT_COLUMNS, dim=1)],
        dim=1,
    )


def _trimmed_means(deltas: Tensor, weights: Tensor, trim: float) -> Tensor:
    values, order = deltas.sort(dim=0)
    rows = []
    for column in weights.T:
        ordered = column[order]  # (k, P), in the order of each coordinate's values
        cumulative = ordered.cumsum(dim=0)
        if trim == 0.5:
            # If the cumulative weight is one half up to rounding, the median is a midpoint.
            slack = 8 * len(ordered) * torch.finfo(torch.float64).eps
            low, high = (
                (cumulative < 0.5 + shift).sum(dim=0, keepdim=True).clamp_max(len(ordered) - 1)
                for shift in (-slack, slack)
            )
            rows.append(
                ((values.gather(0, low) + values.gather(0, high)) / 2)[0] * float(column.any())
            )
        else:
            kept = cumulative.clamp(trim, 1 - trim) - (cumulative - ordered).clamp(trim, 1 - trim)
            rows.append(((kept * values).sum(dim=0) / (1 - 2 * trim)).to(deltas))
    return torch.stack(rows)


def krum_weights(deltas: Tensor, weights: Tensor, malicious: float, multiple: bool) -> Tensor:
    """Compute the weights of (multi-)Krum's mean, ``(k,)``; they sum to 1, or all are zero.

    Args:
        deltas: ``(k, P)``.
        weights: ``(k,)`` float64; sums to 1, or is zero.
        malicious: f as a fraction of the users.
        multiple: If True, keep the n − f best clients with their weights. Otherwise keep the best.
    """
    users = adapter_users(weights)
    if (count := len(users)) > 2:
        hostile = math.floor(malicious * count)
        rows = deltas[users].double()
        squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
        nearest = squares.sort(dim=1).values[
            :, 1 : 1 + max(1, count - hostile - 2)
        ]  # column 0 contains each update's distance to itself
        best = nearest.sum(dim=1).argsort(stable=True)
        users = users[best[: count - hostile if multiple else 1]]
    kept = torch.zeros_like(weights)
    kept[users] = weights[users]
    return kept / kept.sum().clamp_min(torch.finfo(torch.float64).tiny)


def cosine_filter_weights(similarities: Tensor, weights: Tensor) -> Tensor:
    """Compute the weights of the cosine filter's mean, ``(k,)``; they sum to 1, or all are zero.

    They are all zero if every update opposes the others.

    Args:
        similarities: Cosines of all pairs of updates, ``(k, k)`` float64.
        weights: ``(k,)`` float64; sums to 1, or is zero.
    """
    users = adapter_users(weights)
    if len(users) < 3:
        return weights
    votes = torch.zeros_like(weights)
    votes[users] = weights[users]
    others = similarities @ votes - similarities.diagonal() * votes
    kept = torch.where(others > 0, weights, 0.0)
    return kept / kept.sum().clamp_min(torch.finfo(torch.float64).tiny)


def adapter_users(weights: Tensor) -> Tensor:
    """Return the indices of an adapter's users, given its weights ``(k,)``, which sum to 1 or 0."""
    return torch.nonzero(weights * len(weights) >= _MIN_USER_SHARE).flatten()
