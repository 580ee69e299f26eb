"""Similarity of clients: groups by the direction of their updates of one common adapter."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor

from fedmerge_peft.util import row_buffer


def group_by_direction(
    deltas: Tensor,
    max_groups: int,
    seed: int,
    count: int | None = None,
    center: Tensor | None = None,
) -> Tensor:
    """Group clients by k-means of their centered and normalized updates.

    All updates must start from the same adapter. The common part of the updates is then their mean.
    The direction of the remainder distinguishes clients (Sattler et al. 2020, arXiv 1910.01991).
    Its length depends on the amount of training and is ignored. If ``count`` is None, the number of
    groups with the highest ``agreement`` is chosen.

    Args:
        deltas: ``(clients, P)``, sent minus trained, or their mean over several rounds.
        max_groups: Largest number of groups.
        seed: Seed of the starts of k-means.
        count: Number of groups; None to choose it by agreement.
        center: Common part of the updates, ``(1, P)``; None for their mean.

    Returns:
        The group of each client, ``(clients,)`` int64, from 0.
    """
    similarities = cosines(deltas, center)
    if count is not None:
        return k_means(similarities, min(count, max_groups), seed)
    candidates = [
        k_means(similarities, groups, seed)
        for groups in range(1, min(max_groups, len(similarities)) + 1)
    ]
    scores = [agreement(similarities, groups) for groups in candidates]
    return candidates[scores.index(max(scores))]


def split_by_direction(deltas: Tensor, seed: int) -> Tensor:
    """Split updates ``(m, P)`` into two groups by direction; return the groups, ``(m,)`` int64."""
    return k_means(cosines(deltas), 2, seed)


def agreement(cosines: Tensor, groups: Tensor) -> float:
    """Compute the mean cosine between a client's direction and that of the others in its group.

    The direction of the others is their mean direction. A client that is alone in its group counts
    as 0. With too few groups, different clients share a group. With too many, a client has few
    others in its group. The agreement is therefore highest in between.

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
    products = inner_products(deltas, center)
    lengths = products.diagonal().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return products / lengths[:, None] / lengths


def inner_products(vectors: Tensor, center: Tensor | None = None) -> Tensor:
    """Compute the inner products of all pairs of centered vectors, ``(m, m)`` float64.

    Columns are processed in chunks, which bounds memory.

    Args:
        vectors: ``(m, P)``.
        center: Vector ``(1, P)`` to subtract from each vector; None for their mean.
    """
    total = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    width = max(1, row_buffer.CHUNK_BYTES // (8 * len(vectors)))
    for start in range(0, vectors.shape[1], width):
        part = vectors[:, start : start + width].double()
        part -= part.mean(dim=0) if center is None else center[:, start : start + width].double()
        total.addmm_(part, part.T)
    return total


def k_means(products: Tensor, groups: int, seed: int) -> Tensor:
    """Run k-means on vectors that are given by their inner products; keep the best of 20 starts.

    Args:
        products: Inner products of the vectors, which should be centered for precision, ``(m, m)``
            float64.
        groups: Largest number of groups.
        seed: Seed of the starts.

    Returns:
        Group of each vector, ``(m,)`` int64.
    """
    # k-means depends only on distances. Coordinates from the eigenvectors of the m × m inner
    # products preserve them, with m columns instead of P.
    values, directions = torch.linalg.eigh(products)
    points = directions * values.clamp_min(0).sqrt()
    model = KMeans(min(groups, len(products)), n_init=20, random_state=seed % 2**32)
    return torch.from_numpy(model.fit_predict(points.numpy())).long()
