"""FedMerge's server step: update of the soup and the merging weights from the clients' replies.

Symbols (arXiv 2504.06768): Θ is the soup, W the logits and π = softmax(W). θ_i = Σ_j π_ij Θ_j is
the adapter sent to client i, δ_i = θ_i(sent) − θ_i(trained) its update, n_i its number of training
examples, and ρ_i = n_i / Σ n. The objective is Σ_i ρ_i ℓ_i(θ_i). With δ_i in place of the gradient
of ℓ_i, the chain rule yields

    ∂/∂Θ_j  = Σ_i ρ_i π_ij δ_i
    ∂/∂W_ij = ρ_i G_ij,    G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from fedmerge_peft.recipe.strategy_base import WEIGHTS_LR
from fedmerge_peft.util.row_storage import column_chunks, read
from fedmerge_peft.util.vectors import all_finite

Rule = Literal["normalized", "gradient", "paper"]

_PAPER_STEP = 0.01
_PAPER_MAX_STEPS = 10_001


@torch.no_grad()
def fedmerge_step(
    soup: Tensor,
    logits: Tensor,
    deltas: Tensor,
    sizes: Tensor | Sequence[float],
    *,
    rule: Rule = "normalized",
    weights_lr: float | None = None,
    soup_lr: float = 1.0,
    columns: Tensor | Sequence[int] | slice | None = None,
) -> tuple[Tensor, Tensor]:
    """Perform one server step of FedMerge. The arguments are not changed.

    Args:
        soup: Θ, ``(d, P)``.
        logits: W, ``(m, d)``, one row for each of the m clients that replied.
        deltas: δ, ``(m, P)``, sent minus trained.
        sizes: n, ``(m,)``, the number of training examples of each client. Only ratios matter.
        rule: Update rule of W and Θ.

            - ``normalized``: W_i ← W_i − lr · G_i / max_j |G_ij|, then the soup step with the new
              π. The step of W does not depend on the norm of a client's update, so all clients
              specialize at the same pace.
            - ``paper``: the rule of the authors' program. G ← G / Σ|G| over all clients and
              adapters; W_ij ← W_ij − k · 0.01 ρ_i G_ij, where k is the smallest number of such
              steps with which an entry of W changes by more than lr, but at most 10 001; then the
              soup step with the new π.
            - ``gradient``: the chain rule at one point, W_ij ← W_ij − lr · ρ_i G_ij and
              Θ_j ← Θ_j − η Σ_i ρ_i π_ij δ_i.

            With ``normalized`` and ``paper``, the soup step is Θ_j ← Θ_j − η Σ_i q_ij δ_i with
            q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i', a weighted mean for each adapter.
        weights_lr: lr above. Default: 0.3 for ``normalized``, 1 for ``gradient``, 0.01 for
            ``paper``.
        soup_lr: η.
        columns: Columns that enter ⟨·,·⟩, as indices, a mask or a slice. Default: all P. The
            authors use the columns of the last linear layer.

    Returns:
        The new soup ``(d, P)`` and logits ``(m, d)``, in the dtypes of the arguments.

    Raises:
        ValueError: The shapes do not match, the rule is unknown, a size is not positive and finite,
            or a delta is not finite.
    """
    shares = _shares(soup, logits, deltas, sizes)
    if rule not in get_args(Rule):
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(get_args(Rule))}")
    lr = WEIGHTS_LR[rule] if weights_lr is None else weights_lr
    weights = torch.softmax(logits.double(), dim=1)
    new_logits = logits.double() - logits_step(
        rule, weights_gradient(soup, weights, deltas, columns), shares, lr
    )
    mixing = (
        weights * shares[:, None]
        if rule == "gradient"
        else soup_shares(torch.softmax(new_logits, dim=1), shares)
    )
    return soup - soup_lr * (mixing.T.to(deltas) @ deltas).to(soup), new_logits.to(logits)


def soup_shares(weights: Tensor, shares: Tensor) -> Tensor:
    """Compute the weight of each client's update for each adapter.

    Columns sum to 1, or are zero if no client has a weight for the adapter.

    q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i', ``(m, d)`` float64.

    Args:
        weights: π, ``(m, d)``.
        shares: ρ, ``(m,)``.
    """
    mixing = weights.double() * shares[:, None]
    return mixing / mixing.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)


def logits_step(rule: Rule, gradient: Tensor, shares: Tensor, lr: float) -> Tensor:
    """Compute the step to subtract from the logits, ``(m, d)``, by a rule of ``fedmerge_step``.

    Args:
        rule: Update rule.
        gradient: G, ``(m, d)`` float64.
        shares: ρ, ``(m,)`` float64.
        lr: ``weights_lr`` of ``fedmerge_step``.
    """
    match rule:
        case "paper":
            return _paper_step(gradient, shares, lr)
        case "gradient":
            return lr * shares[:, None] * gradient
        case "normalized":
            return lr * _scale_rows(gradient)


def weights_gradient(
    soup: Tensor,
    weights: Tensor,
    deltas: Tensor,
    columns: Tensor | Sequence[int] | slice | None = None,
    norms: Tensor | None = None,
) -> Tensor:
    """Compute G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩, ``(m, d)`` float64.

    With θ_i = Σ_j π_ij Θ_j and s_ij = ⟨Θ_j, δ_i⟩, this is π_ij (s_ij − Σ_k π_ik s_ik). One matrix
    product of (m, P) and (P, d) suffices. Rows that contain only rounding error are set to zero.

    Args:
        soup: Θ, ``(d, P)``.
        weights: π, ``(m, d)``.
        deltas: δ, ``(m, P)``.
        columns: Columns that enter ⟨·,·⟩, as indices, a mask or a slice. Default: all P.
        norms: ‖δ_i‖₂ over all P columns, ``(m,)``, if known. This saves a pass over the deltas.
    """
    if columns is not None:
        soup, deltas, norms = soup[:, columns], deltas[:, columns], None
    if norms is None:
        norms = deltas.norm(dim=1)
    scores = deltas.new_zeros(len(deltas), len(soup), dtype=torch.float64)
    lengths = []  # ‖Θ_j − Θ̄‖₂ and ‖Θ_j‖₂, (2, d), in each chunk of columns
    for part in column_chunks(soup):
        rows = read(soup, part)
        # G does not change if the same vector is subtracted from every Θ_j. Subtracting their mean
        # avoids cancellation in the products.
        centered = rows - rows.mean(dim=0)
        scores += (deltas[:, part] @ centered.T.to(deltas)).double()
        lengths.append(torch.stack([centered.norm(dim=1), rows.norm(dim=1)]))
    gradient = weights * (scores - (weights * scores).sum(dim=1, keepdim=True))
    # If adapters are equal, only the rounding errors of the products and of the rows themselves
    # remain. A normalizing rule would amplify these errors.
    spread, length = reduce(torch.hypot, lengths).amax(dim=1)
    eps, coarseness = torch.finfo(rows.dtype).eps, torch.finfo(soup.dtype).eps
    longest = spread + coarseness / eps * length * soup.shape[1] ** -0.5
    rounding = 4 * eps * norms.double() * longest.double()
    return torch.where(gradient.abs().amax(dim=1, keepdim=True) > rounding[:, None], gradient, 0.0)


def _scale_rows(gradient: Tensor) -> Tensor:
    """Divide each row by its largest absolute entry; rows of zeros do not change."""
    largest = gradient.abs().amax(dim=1, keepdim=True)
    return torch.where(
        largest > 0, gradient / largest.clamp_min(torch.finfo(torch.float64).tiny), 0.0
    )


def _paper_step(gradient: Tensor, shares: Tensor, lr: float) -> Tensor:
    """Compute k · 0.01 ρ_i G_ij / Σ|G|, ``(m, d)``.

    k is the smallest number with which an absolute entry exceeds lr, but at most 10 001.
    """
    total = gradient.abs().sum()
    if total == 0:
        return torch.zeros_like(gradient)
    step = _PAPER_STEP * shares[:, None] * gradient / total
    largest = float(step.abs().max())
    count = math.floor(lr / largest) + 1 if lr < largest * _PAPER_MAX_STEPS else _PAPER_MAX_STEPS
    return count * step


def _shares(
    soup: Tensor, logits: Tensor, deltas: Tensor, sizes: Tensor | Sequence[float]
) -> Tensor:
    """Check the arguments of ``fedmerge_step`` and return ρ, ``(m,)`` float64."""
    n = torch.as_tensor(sizes, dtype=torch.float64, device=deltas.device)
    if (
        (soup.ndim, logits.ndim, deltas.ndim, n.ndim) != (2, 2, 2, 1)
        or logits.shape != (len(n), len(soup))
        or deltas.shape != (len(n), soup.shape[1])
        or len(n) == 0
    ):
        raise ValueError(
            "expected soup (d, P), logits (m, d), deltas (m, P), sizes (m,), m > 0; "
            f"got {tuple(soup.shape)}, {tuple(logits.shape)}, {tuple(deltas.shape)}, "
            f"{tuple(n.shape)}"
        )
    if not bool((n > 0).all()) or not bool(torch.isfinite(n).all()):
        raise ValueError(
            "sizes must be positive and finite; remove clients without training examples"
        )
    if not all_finite(deltas):
        rows = torch.nonzero(~torch.isfinite(deltas).all(dim=1)).flatten().tolist()
        more = f" and {len(rows) - 20} more" if len(rows) > 20 else ""
        raise ValueError(f"deltas must be finite; remove or correct rows {rows[:20]}{more}")
    return n / n.sum()
