"""Who is alike: clients grouped by the direction in which one common adapter would have to move for each of them."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fedmerge_peft.util import row_buffer


def group_by_direction(
    deltas: Tensor, most: int, seed: int, count: int | None = None, centre: Tensor | None = None
) -> Tensor:
    """k-means of the clients' updates, centred and normalised; all must have started from the same adapter.

    With one common adapter, what clients share cancels in the mean, and what is left of an update says what its client
    wants otherwise; its length says how much the client trained, which is not the question. (Update directions as a sign
    of who is alike: Sattler et al. 2020, arXiv 1910.01991.) How many groups there are is told by how well each client's
    direction agrees with the others' of its group (``agreement``).

    Args:
        deltas: ``(clients, P)``, sent minus trained, or their mean over several rounds.
        most: How many groups there may be.
        seed: For the starts of k-means.
        count: How many groups to make; None to let the agreement tell.
        centre: What clients share, ``(1, P)``; None for the mean of their updates.

    Returns:
        The group of each client, ``(clients,)`` int64, from 0.
    """
    between = cosines(deltas, centre)
    if count is not None:
        return k_means(between, min(count, most), seed)
    found = [k_means(between, groups, seed) for groups in range(1, min(most, len(between)) + 1)]
    scores = [agreement(between, groups) for groups in found]
    return found[scores.index(max(scores))]


def split_by_direction(deltas: Tensor, seed: int) -> Tensor:
    """The two groups of the clients' updates ``(m, P)``, ``(m,)`` int64, by direction."""
    return k_means(cosines(deltas), 2, seed)


def agreement(cosines: Tensor, groups: Tensor) -> float:
    """Mean cosine of each client's direction and the mean direction of the others in its group; 0 for a client alone.

    Too few groups mix what differs; too many leave each client few others to learn from. So it is largest in between.

    Args:
        cosines: ``(clients, clients)``.
        groups: ``(clients,)``.
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


def cosines(deltas: Tensor, centre: Tensor | None = None) -> Tensor:
    """Of each two updates less ``centre`` ``(1, P)``, or their mean, ``(clients, clients)`` float64; 0 for one of length zero."""
    products = inner_products(deltas, centre)
    lengths = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return products / lengths[:, None] / lengths


def inner_products(vectors: Tensor, centre: Tensor | None = None) -> Tensor:
    """Of vectors ``(m, P)`` less ``centre`` ``(1, P)``, or their mean, ``(m, m)`` float64; some columns at a time, to bound memory."""
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    width = max(1, row_buffer.CHUNK_BYTES // (8 * len(vectors)))
    for start in range(0, vectors.shape[1], width):
        part = vectors[:, start : start + width].double()
        part -= part.mean(dim=0) if centre is None else centre[:, start : start + width].double()
        total.addmm_(part, part.T)
    return total


def k_means(products: Tensor, groups: int, seed: int) -> Tensor:
    """The group of each vector, ``(m,)`` int64: at most ``groups``, the best of twenty starts.

    Args:
        products: The vectors' inner products (centred, for precision), ``(m, m)`` float64.
        groups: How many groups.
        seed: For the starts.
    """
    # Distances are all that k-means sees: the eigenvectors of the m × m inner products keep them, at m columns for P.
    values, directions = torch.linalg.eigh(products)
    points = directions * values.clamp_min(0).sqrt()
    means = KMeans(min(groups, len(products)), n_init=20, random_state=seed % 2**32)
    return torch.from_numpy(means.fit_predict(points.numpy())).long()
