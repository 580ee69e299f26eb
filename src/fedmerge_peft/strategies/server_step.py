"""FedMerge's server step: what the clients' replies change in the soup and the merging weights.

Symbols (arXiv 2504.06768): Θ soup, W logits, π = softmax(W), θ_i = Σ_j π_ij Θ_j the adapter sent to client i,
δ_i = θ_i(sent) − θ_i(trained) its reply, n_i its number of training examples, ρ_i = n_i / Σ n.
The objective is Σ_i ρ_i ℓ_i(θ_i); with δ_i for the gradient of ℓ_i, the chain rule through the merge gives

    ∂/∂Θ_j  = Σ_i ρ_i π_ij δ_i
    ∂/∂W_ij = ρ_i G_ij,    G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fedmerge_peft.util.vectors import all_finite

Rule = Literal["normalized", "gradient", "paper"]

WEIGHTS_LR: dict[Rule, float] = {"normalized": 1.0, "gradient": 1.0, "paper": 0.01}
_PAPER_STEP = 0.01
_PAPER_MOST_STEPS = 10_001


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
    """One server step of FedMerge for the m clients that replied; the arguments are not changed.

    Args:
        soup: Θ, ``(d, P)``.
        logits: W, ``(m, d)``, the rows of the clients that replied.
        deltas: δ, ``(m, P)``, sent minus trained.
        sizes: n, ``(m,)``, training examples of each client; any positive unit.
        rule: How W steps, and with which π the soup then does.

            - ``normalized``: W_i ← W_i − lr · G_i / max_j |G_ij|, then the soup with the new π. The scale of a client's
              reply does not matter, so all clients specialise at one pace.
            - ``paper``: the authors' program. G ← G / Σ|G| over all clients and adapters; W ← W − k · 0.01 ρ_i G_ij, where k
              is the first count at which some |ΔW| exceeds lr (10 001 if none does); then the soup with the new π.
            - ``gradient``: the chain rule at one point, W_ij ← W_ij − lr · ρ_i G_ij and Θ_j ← Θ_j − η Σ_i ρ_i π_ij δ_i.

            With ``normalized`` and ``paper`` the soup's step is Θ_j ← Θ_j − η Σ_i q_ij δ_i with
            q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i', a weighted mean for each adapter.
        weights_lr: lr above; by default 1, and 0.01 for the paper's rule.
        soup_lr: η.
        columns: Which of the P columns ⟨·,·⟩ runs over, as an index or a mask; by default all. The authors use the final
            linear layer's.

    Returns:
        The new soup ``(d, P)`` and logits ``(m, d)``, in the dtypes they came in.

    Raises:
        ValueError: Shapes that do not fit, an unknown rule, sizes that are not positive, or deltas that are not finite.
    """
    shares = _shares(soup, logits, deltas, sizes)
    if rule not in WEIGHTS_LR:
        raise ValueError(f"unknown rule {rule!r}; choose one of {', '.join(WEIGHTS_LR)}")
    lr = WEIGHTS_LR[rule] if weights_lr is None else weights_lr
    weights = torch.softmax(logits.double(), dim=1)
    new_logits = logits.double() - weights_move(
        rule, weights_gradient(soup, weights, deltas, columns), shares, lr
    )
    mixing = (
        weights * shares[:, None]
        if rule == "gradient"
        else soup_shares(torch.softmax(new_logits, dim=1), shares)
    )
    return soup - soup_lr * (mixing.T.to(deltas) @ deltas).to(soup), new_logits.to(logits)


def soup_shares(weights: Tensor, shares: Tensor) -> Tensor:
    """q_ij = π_ij ρ_i / Σ_i' π_i'j ρ_i', ``(m, d)`` float64: what each client's update counts for each adapter; columns sum to 1."""
    mixing = weights.double() * shares[:, None]
    return mixing / mixing.sum(dim=0).clamp_min(torch.finfo(torch.float64).tiny)


def weights_move(rule: Rule, gradient: Tensor, shares: Tensor, lr: float) -> Tensor:
    """How far the logits step against G ``(m, d)``, by the rules of ``fedmerge_step``."""
    match rule:
        case "paper":
            return _paper_move(gradient, shares, lr)
        case "gradient":
            return lr * shares[:, None] * gradient
        case "normalized":
            return lr * _rows_scaled(gradient)


def weights_gradient(
    soup: Tensor,
    weights: Tensor,
    deltas: Tensor,
    columns: Tensor | Sequence[int] | slice | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """G_ij = π_ij ⟨Θ_j − θ_i, δ_i⟩ over the chosen columns, ``(m, d)`` float64; zero where it is only rounding error.

    As θ_i = Σ_j π_ij Θ_j, with s_ij = ⟨Θ_j, δ_i⟩ this is π_ij (s_ij − Σ_k π_ik s_ik): one product of (m, P) by (P, d). ``lengths``
    spares a pass over the deltas where ‖δ_i‖₂ ``(m,)``, over all columns, are known.
    """
    if columns is not None:
        soup, deltas, lengths = soup[:, columns], deltas[:, columns], None
    if lengths is None:
        lengths = deltas.norm(dim=1)
    # G does not change when one vector is taken from every Θ_j; without their mean the products do not cancel.
    centred = soup - soup.mean(dim=0)
    scores = (deltas @ centred.T.to(deltas)).double()
    gradient = weights * (scores - (weights * scores).sum(dim=1, keepdim=True))
    # Where adapters are the same, what is left is rounding: of the products, and of rows that were stored each by itself, whose
    # errors have no common direction. A rule that normalises would blow it up.
    longest = centred.norm(dim=1).max() + soup.norm(dim=1).max() * soup.shape[1] ** -0.5
    rounding = 4 * torch.finfo(soup.dtype).eps * lengths.double() * longest.double()
    return torch.where(gradient.abs().amax(dim=1, keepdim=True) > rounding[:, None], gradient, 0.0)


def _rows_scaled(gradient: Tensor) -> Tensor:
    """Each row divided by its largest entry; rows of zeros stay."""
    largest = gradient.abs().amax(dim=1, keepdim=True)
    return torch.where(
        largest > 0, gradient / largest.clamp_min(torch.finfo(torch.float64).tiny), 0.0
    )


def _paper_move(gradient: Tensor, shares: Tensor, lr: float) -> Tensor:
    """K · 0.01 ρ_i G_ij / Σ|G|, with k the first count at which some entry exceeds lr, at most 10 001."""
    total = gradient.abs().sum()
    if total == 0:
        return torch.zeros_like(gradient)
    step = _PAPER_STEP * shares[:, None] * gradient / total
    most = float(step.abs().max())
    count = math.floor(lr / most) + 1 if lr < most * _PAPER_MOST_STEPS else _PAPER_MOST_STEPS
    return count * step


def _shares(
    soup: Tensor, logits: Tensor, deltas: Tensor, sizes: Tensor | Sequence[float]
) -> Tensor:
    """ρ, ``(m,)`` float64, once all shapes fit."""
    n = torch.as_tensor(sizes, dtype=torch.float64, device=deltas.device)
    if soup.ndim != 2 or logits.ndim != 2 or deltas.ndim != 2 or n.ndim != 1:
        raise ValueError("expected soup (d, P), logits (m, d), deltas (m, P), sizes (m,)")
    (d, p), m = soup.shape, len(logits)
    if logits.shape != (m, d) or deltas.shape != (m, p) or n.shape != (m,) or m == 0:
        raise ValueError(
            f"expected soup (d, P), logits (m, d), deltas (m, P), sizes (m,), at least one client; got {tuple(soup.shape)}, "
            f"{tuple(logits.shape)}, {tuple(deltas.shape)}, {tuple(n.shape)}"
        )
    if not bool((n > 0).all()) or not bool(torch.isfinite(n).all()):
        raise ValueError(
            "sizes must be positive and finite: a client without examples cannot take part"
        )
    if not all_finite(deltas):
        raise ValueError(
            f"the deltas of clients {[int(i) for i in torch.nonzero(~torch.isfinite(deltas).all(dim=1)).flatten()]} are not finite"
        )
    return n / n.sum()
