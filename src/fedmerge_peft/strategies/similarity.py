"""Similarity of clients: groups by the direction of their updates of one common adapter."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from fedmerge_peft.util import row_buffer
from fedmerge_peft.util.row_storage import column_chunks, in_chunks, read

_MIN_EXCESS = 0.12
"""Smallest excess of the agreement within groups over that of unrelated clients, to form groups."""
_MIN_FURTHER = 0.25
"""Smallest excess for dividing a group. It is larger than ``_MIN_EXCESS``, because the excess that
arises by chance is larger among few clients."""
_CONFLICT = 0.3
"""Smallest ratio of the excess to the agreement of all clients' whole updates, to form groups."""
_FEWEST = 6
"""Smallest group that may be divided further. With fewer clients, agreement is too uncertain."""
_ALONE = 0.75
"""Ratio of the agreement with all other clients to a client's own repeatability, below which one
shared adapter is worse than an adapter for each client."""
_MOST_GROUPS = 32
"""Largest number of groups into which all clients, or one group, are divided at once."""


@dataclass(frozen=True)
class Grouping:
    """Groups of clients, and the reason for their number."""

    groups: Tensor
    """Group of each client, ``(clients,)`` int64, from 0."""
    reason: str
    """Clause that gives the reason; it follows the number of groups in a sentence."""
    directions: Tensor
    """Cosines of the clients' centered directions, ``(clients, clients)`` float64."""


def group_by_direction(
    deltas: Tensor,
    max_groups: int,
    seed: int,
    *,
    count: int | None = None,
    center: Tensor | None = None,
    repeatability: Tensor | None = None,
) -> Grouping:
    """Group clients by k-means of the directions of their updates, without their common part.

    All updates must start from the same adapter. The directions are the updates scaled to unit
    length, and their common part is their mean. The direction of the remainder distinguishes
    clients (Sattler et al. 2020, arXiv 1910.01991). The length of an update depends on the amount
    of training and is ignored. Without scaling, clients with much training would dominate the mean,
    and all clients with little training would have about the same remainder.

    The number of groups follows from an excess: the ``agreement`` of the clients with the others in
    their group, minus the agreement that clients without any similarity would have.

    - The clients form groups if the excess is at least 0.12, and at least 0.3 times the agreement
      of the whole updates of all clients. Below the second limit, what all clients have in common
      outweighs the differences between groups. In experiments, the excess was below 0.27 times that
      agreement if clients differed only by noise, or each in its own way. With real groups, the
      excess was above 0.32 times that agreement, and in most cases far above.
    - The number of groups is the number with the highest excess.
    - A group of at least six clients is divided further as long as its clients form groups with an
      excess of at least 0.25, because large differences between groups hide smaller differences.
      In experiments, the excess was above 0.30 in groups that contained smaller groups. In groups
      of similar clients, it was below 0.21, by chance.

    If the clients form no groups, all clients share one adapter, with one exception: each client is
    a group of its own if ``max_groups`` allows it, and the agreement of all clients is less than
    0.75 times the mean ``repeatability``. A client's updates of different rounds then agree, on
    average, far better with each other than with the updates of the other clients.

    Args:
        deltas: Updates, ``(clients, P)``, sent minus trained, or their means over several rounds.
        max_groups: Largest number of groups.
        seed: Seed of the starts of k-means.
        count: Number of groups, limited to ``max_groups``; None to determine it. Fewer groups are
            formed if there are fewer different directions.
        center: Common part of the directions, ``(1, P)``; None for their mean.
        repeatability: Agreement of each client's updates of different rounds, ``(clients,)``
            (``MeanUpdates.repeatability``); None if it is unknown.
    """
    clients = len(deltas)
    whole = cosines(deltas, torch.zeros(1, deltas.shape[1]))
    directions = (
        _recentered(whole)
        if center is None
        else cosines(torch.nn.functional.normalize(deltas, dim=1), center)
    )
    if count is not None:
        groups = k_means(coordinates(directions), min(count, max_groups), seed)
        reason = (
            "as set in the recipe"
            if len(set(groups.tolist())) == count
            else f"fewer than the {count} set in the recipe, because not enough updates differ"
        )
        return Grouping(groups, reason, directions)
    groups, excess = _divide(whole, directions, max_groups, seed, _MIN_EXCESS)
    together = agreement(whole, torch.zeros(clients, dtype=torch.int64))
    compared = f"updates agree to {together:.2f} (mean cosine) with those of all other clients"
    if bool(groups.any()):
        groups = _divide_further(directions, groups, max_groups, seed)
        reason = f"{compared}, and their agreement within groups is {excess:.2f} above chance"
        return Grouping(groups, reason, directions)
    own = 0.0 if repeatability is None else float(repeatability.mean())
    if 1 < clients <= max_groups and together < _ALONE * own:
        reason = f"{compared}, but to {own:.2f} with the same client's updates of other rounds"
        return Grouping(torch.arange(clients), reason, directions)
    if clients == 1:
        reason = "only one client has replied"
    elif min(max_groups, clients - 1) < 2:
        limit = "strategy.adapters is 1" if max_groups == 1 else "only two clients have replied"
        reason = f"{compared}, and no groups were tried, because {limit}"
    else:
        reason = f"{compared}, and their agreement within groups is only {excess:.2f} above chance"
    return Grouping(groups, reason, directions)


def _divide(
    whole: Tensor, directions: Tensor, max_groups: int, seed: int, least: float
) -> tuple[Tensor, float]:
    """Return the group of each client, 0 for all if they form no groups, and the highest excess.

    Args:
        whole: Cosines of all pairs of updates, from which no common part was subtracted, ``(m, m)``
            float64.
        directions: Cosines of all pairs of centered updates, ``(m, m)`` float64.
        max_groups: Largest number of groups.
        seed: Seed of the starts of k-means.
        least: Smallest excess of the agreement with which clients form groups.
    """
    clients = len(whole)
    one = torch.zeros(clients, dtype=torch.int64)
    excess: dict[int, float] = {}
    groupings: dict[int, Tensor] = {}
    points = coordinates(directions)
    for number in range(2, min(max_groups, clients - 1, _MOST_GROUPS) + 1):
        groupings[number] = k_means(points, number, seed)
        chance = agreement(_unrelated(clients), groupings[number])
        excess[number] = agreement(directions, groupings[number]) - chance
    best = max(excess.values(), default=0.0)
    if best < max(least, _CONFLICT * agreement(whole, one)):
        return one, best
    return groupings[max(excess, key=excess.__getitem__)], best


def _divide_further(directions: Tensor, groups: Tensor, max_groups: int, seed: int) -> Tensor:
    """Divide groups as long as their clients form smaller groups; return the new groups, ``(m,)``.

    Within a group, the cosines ``(m, m)`` of the centered directions take the place of the cosines
    of the whole updates.
    """
    waiting = [
        (members, directions[members][:, members])
        for members in (torch.nonzero(groups == group).flatten() for group in range(len(groups)))
        if len(members)
    ]
    done: list[Tensor] = []
    while waiting:
        members, whole = waiting.pop(0)
        most = max_groups - len(done) - len(waiting)
        centered = _recentered(whole)
        parts = torch.zeros(len(members), dtype=torch.int64)
        if len(members) >= _FEWEST and most > 1:
            parts, _ = _divide(whole, centered, most, seed, _MIN_FURTHER)
        if not bool(parts.any()):
            done.append(members)
            continue
        for part in range(int(parts.max()) + 1):
            inside = torch.nonzero(parts == part).flatten()
            waiting.append((members[inside], centered[inside][:, inside]))
    divided = torch.zeros_like(groups)
    for number, members in enumerate(sorted(done, key=lambda members: int(members[0]))):
        divided[members] = number
    return divided


def _recentered(cosines: Tensor) -> Tensor:
    """Return the cosines of unit vectors after their mean is subtracted, ``(m, m)``.

    Args:
        cosines: Cosines of the unit vectors themselves, ``(m, m)`` float64.
    """
    products = cosines - cosines.mean(dim=0) - cosines.mean(dim=1, keepdim=True) + cosines.mean()
    return _normalized(products, 64 * len(cosines) * torch.finfo(torch.float64).eps)


def split_by_direction(deltas: Tensor, seed: int) -> Tensor:
    """Split updates ``(m, P)`` in two by direction; return the group of each, ``(m,)`` int64."""
    return k_means(coordinates(cosines(deltas)), 2, seed)


def nearest_row(deltas: Tensor, rows: Tensor) -> Tensor:
    """Find the row that each update points to, argmax_j cos(−δ_i, Θ_j − Θ̄).

    Args:
        deltas: Updates of the mean row Θ̄, sent minus trained, ``(k, P)``.
        rows: Θ, ``(d, P)``.

    Returns:
        Indices of rows, ``(k,)`` int64.
    """
    if not in_chunks(rows):
        directions = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
        return (-deltas @ directions.T).argmax(dim=1)
    scores = torch.zeros(len(deltas), len(rows), dtype=torch.float64)
    squares = torch.zeros(len(rows), dtype=torch.float64)
    for part in column_chunks(rows):
        chunk = read(rows, part)
        centered = chunk - chunk.mean(dim=0)
        scores -= (deltas[:, part] @ centered.T).double()
        squares += centered.square().sum(dim=1).double()
    return (scores / squares.sqrt().clamp_min(1e-12)).argmax(dim=1)


def _unrelated(clients: int) -> Tensor:
    """Return the cosines of centered directions without similarity, ``(clients, clients)``."""
    cosines = torch.full((clients, clients), -1 / (clients - 1), dtype=torch.float64)
    return cosines.fill_diagonal_(1.0)


def agreement(cosines: Tensor, groups: Tensor) -> float:
    """Compute the mean over the clients of their cosine with the other clients in their group.

    The cosine is taken between a client's direction and the mean direction of the other clients in
    its group. It counts as 0 for a client that is alone in its group. With too few groups,
    dissimilar clients share a group. With too many groups, there are few other clients in a group.
    The agreement is therefore highest in between.

    Args:
        cosines: Cosines of all pairs of clients, ``(clients, clients)`` float64.
        groups: Group of each client, ``(clients,)``.
    """
    others = (groups[:, None] == groups).double().fill_diagonal_(0.0)
    count = others.sum(dim=1)
    along = (others * cosines).sum(dim=1)
    length = torch.einsum("ij,jk,ik->i", others, cosines, others).clamp_min(0).sqrt()
    return float(
        torch.where(
            (count > 0) & (length > 0),
            along / length.clamp_min(torch.finfo(torch.float64).tiny),
            0.0,
        ).mean()
    )


def cosines(deltas: Tensor, center: Tensor | None = None) -> Tensor:
    """Compute the cosines of all pairs of centered updates, ``(clients, clients)`` float64.

    The cosines of a zero vector are 0.

    Args:
        deltas: ``(clients, P)``.
        center: Vector ``(1, P)`` to subtract from each update; None for their mean.
    """
    return _normalized(inner_products(deltas, center))


def _normalized(products: Tensor, rounding: float = 0.0) -> Tensor:
    """Return cosines from inner products, ``(m, m)``.

    The cosines of a vector are 0 if its squared length is at most ``rounding``.
    """
    squares = products.diagonal()
    inverse = torch.where(squares > rounding, squares.clamp_min(0).rsqrt(), 0.0)
    return products * inverse[:, None] * inverse


def inner_products(vectors: Tensor, center: Tensor | None = None) -> Tensor:
    """Compute the inner products of all pairs of centered vectors, ``(m, m)`` float64.

    Columns are processed in chunks, which bounds memory.

    Args:
        vectors: ``(m, P)``.
        center: Vector ``(1, P)`` to subtract from each vector; None for their mean.
    """
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    width = max(1, row_buffer.BLOCK_BYTES // (8 * len(vectors)))
    for start in range(0, vectors.shape[1], width):
        part = vectors[:, start : start + width].double()
        part -= part.mean(dim=0) if center is None else center[:, start : start + width].double()
        total.addmm_(part, part.T)
    return total


def coordinates(products: Tensor) -> Tensor:
    """Compute m points ``(m, m)`` float64 from their inner products ``(m, m)`` float64.

    k-means depends only on distances. Coordinates from the eigenvectors of the inner products
    preserve the distances, with m columns instead of P.
    """
    values, directions = torch.linalg.eigh(products)
    points: Tensor = directions * values.clamp_min(0).sqrt()
    return points


def k_means(points: Tensor, groups: int, seed: int) -> Tensor:
    """Run k-means; keep the best of 20 starts.

    Args:
        points: One row for each point, ``(m, n)`` float64.
        groups: Largest number of groups. Equal points are in one group.
        seed: Seed of the starts.

    Returns:
        Group of each point, ``(m,)`` int64, from 0.
    """
    model = KMeans(min(groups, len(points)), n_init=20, random_state=seed % 2**32)
    with warnings.catch_warnings():  # warnings about fewer distinct points than groups
        warnings.simplefilter("ignore", ConvergenceWarning)
        _, labels = np.unique(model.fit_predict(points.numpy()), return_inverse=True)
    return torch.from_numpy(labels).long()
