"""FedPAC: features aligned with global class centroids, and heads combined for each client.

Source: Xu, Tong and Huang 2023, arXiv 2306.11867.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import Tensor

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.personal_strategies import FedPACRecipe
from fedmerge_peft.strategies.base import Reply, StrategyContext
from fedmerge_peft.strategies.fedavg import FedAvg
from fedmerge_peft.strategies.partly_shared import PartlyShared
from fedmerge_peft.training.plan import Alignment, MeasuredTrain, Plan

_SMALLEST = 1e-3
"""Smallest weight of a head in a combination; smaller weights are set to zero."""


class FedPAC(PartlyShared):
    """Shared body φ with features f_φ(x), and a linear head h_i for each client (algorithm 1).

    In each round a client trains

        h_i on ℓ_i(φ, h) with φ as sent,
        then φ on ℓ_i(φ, h_i) + λ · mean over examples (x, y) of 1/d ‖f_φ(x) − c_y‖²

    Each of the two steps runs all epochs (or optimizer steps) of ``training``. d is the number of
    features, and c_y the centroid of class y. Let n_ik be client i's number of examples of class k,
    n_i = Σ_k n_ik, and Σ_{x∈k} the sum over a client's examples of class k. The server averages the
    bodies and the centroids (equations 4 and 5),

        φ ← φ − η Σ_i ρ_i δ_i,    c_k ← Σ_i Σ_{x∈k} f_i(x) / Σ_i n_ik

    where f_i are the features of client i's trained body. The server combines the heads (equation
    12): h_i ← Σ_j α_ij h_j with

        α_i = argmin_α  Σ_j α_j² v_j + Σ_k ‖H_ik − Σ_j α_j H_jk‖²   s.t.  α ≥ 0,  Σ_j α_j = 1

        H_jk = Σ_{x∈k} f(x) / n_j,    v_j = (1 / n_j) (Σ_k Σ_{x∈k} ‖f(x)‖² / n_j − Σ_k ‖H_jk‖²)

    where f are the features of φ as sent. The first term is the variance of the combined head, the
    second its squared bias. Weights α_ij below 0.001 are set to zero, and the others are rescaled.

    The head is the last linear layer, and f is its input. The sums run over the clients that
    replied; other clients keep their heads. The first round has no centroids and no penalty. A
    class keeps its centroid in rounds without examples of the class. Classes without a centroid
    have no penalty.

    Differences from the paper:

    - In the paper, a penalty draws the features of a class without a global centroid to their mean.
    - In the authors' program, the head trains for one epoch, with its own learning rate of 0.1.
    """

    state_fields = (*PartlyShared.state_fields, "centroids")

    def __init__(self, recipe: FedPACRecipe, context: StrategyContext) -> None:
        entry = context.layout.classifier
        if entry is None:
            raise RecipeError(
                "strategy.name: fedpac combines the heads of a classifier, but this adapter "
                "has none; use a classification task"
            )
        layer = entry.key.rpartition(".")[0]
        super().__init__(
            lambda inner: FedAvg(recipe, inner),
            context,
            lambda part: part.key.rpartition(".")[0] != layer,
        )
        self.averages = False
        self.alignment = recipe.alignment
        self.centroids = torch.full(entry.shape, torch.nan)
        """Centroids c, ``(classes, d)``; nan for classes without a centroid."""

    def plan(self, client: int) -> Plan:
        classes, width = self.centroids.shape
        known = not bool(self.centroids.isnan().all())
        return MeasuredTrain(
            self.adapter(client),
            phases=(~self.shared, self.shared),
            alignment=Alignment(self.centroids, self.alignment) if known else None,
            statistics_shape=(2, classes, width + 2),
        )

    def update(self, replies: Iterable[Reply]) -> None:
        ordered = sorted(replies, key=lambda reply: reply.client)
        super().update(ordered)
        clients = [reply.client for reply in ordered]
        measured = [reply.statistics for reply in ordered if reply.statistics is not None]
        sent, trained = torch.stack(measured).double().unbind(1)  # (clients, classes, d + 2)
        counts, sums = trained[..., 0].sum(dim=0), trained[..., 2:].sum(dim=0)
        means = (sums / counts[:, None]).float()  # nan for classes without examples
        self.centroids = torch.where(counts[:, None] > 0, means, self.centroids)
        heads = self.private_rows[clients]
        self.private_rows[clients] = head_weights(sent).to(heads) @ heads

    def traffic(self, client: int) -> tuple[int, int]:
        size, centroids = self.layout.size, self.centroids.numel()
        known = not bool(self.centroids.isnan().all())
        return size + known * centroids, size + 2 * (centroids + 2 * len(self.centroids))


def head_weights(statistics: Tensor) -> Tensor:
    """Compute α, the weights with which each client combines the heads, ``(m, m)`` float64.

    Args:
        statistics: Number of examples, Σ ‖f‖² and Σ f of each client and class,
            ``(m, classes, d + 2)`` float64.

    Returns:
        One row for each client; rows sum to 1.
    """
    sizes = statistics[..., 0].sum(dim=1)  # (m,)
    means = (statistics[..., 2:] / sizes[:, None, None]).flatten(1)  # H, (m, classes · d)
    squares = statistics[..., 1].sum(dim=1) / sizes
    variances = ((squares - means.square().sum(dim=1)) / sizes).clamp_min(0).numpy()
    products = (means @ means.T).numpy()
    rows = []
    for own in range(len(products)):
        # ⟨H_i − H_j, H_i − H_l⟩ for all pairs j, l
        bias = products[own, own] - products[own][:, None] - products[own][None] + products
        weights = least_quadratic(bias + np.diag(variances))
        weights[weights < _SMALLEST] = 0
        rows.append(weights / weights.sum())
    return torch.from_numpy(np.stack(rows))


def least_quadratic(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """Minimize αᵀ M α over the simplex, α ≥ 0 and Σ α = 1.

    The objective is homogeneous, so α is proportional to the solution of min ½ βᵀ M β − Σ β over
    β ≥ 0. With M = L Lᵀ, this is the non-negative least squares problem ‖Lᵀ β − L⁻¹ 1‖².

    Args:
        matrix: M, ``(m, m)``, positive semidefinite. A small multiple of the identity is added.

    Returns:
        α, ``(m,)``. If M is zero, all entries are equal.
    """
    count = len(matrix)
    scale = float(np.trace(matrix)) / count
    if scale <= 0:
        return np.full(count, 1 / count)
    factor = np.linalg.cholesky(matrix / scale + 1e-9 * np.eye(count))
    solution = nnls(factor.T, np.linalg.solve(factor, np.ones(count)), maxiter=100 * count)[0]
    return np.asarray(solution / solution.sum())
