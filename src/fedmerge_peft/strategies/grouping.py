"""Who is alike: clients grouped by the direction in which one common adapter would have to move for each of them."""

from __future__ import annotations

import torch
from sklearn.cluster import KMeans
from torch import Tensor


def group_by_direction(deltas: Tensor, groups: int, seed: int) -> Tensor:
    """k-means of the clients' updates, centred and normalised; all must have started from the same adapter.

    With one common adapter, what clients share cancels in the mean, and what is left of an update says what its client
    wants otherwise; its length says how much the client trained, which is not the question. (Update directions as a sign
    of who is alike: Sattler et al. 2020, arXiv 1910.01991.)

    Args:
        deltas: ``(clients, P)``, sent minus trained, or their mean over several rounds.
        groups: How many groups at most; no more than there are clients.
        seed: For the starts of k-means.

    Returns:
        The group of each client, ``(clients,)`` int64.
    """
    centred = deltas.double() - deltas.double().mean(dim=0)
    directions = centred / centred.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    # Distances are all that k-means sees: the eigenvectors of the m × m inner products keep them, at m columns for P.
    values, vectors = torch.linalg.eigh(directions @ directions.T)
    points = vectors * values.clamp_min(0).sqrt()
    means = KMeans(min(groups, len(deltas)), n_init=20, random_state=seed % 2**32)
    return torch.from_numpy(means.fit_predict(points.numpy())).long()
