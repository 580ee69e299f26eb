"""A round's replies as a matrix of which a chunk is looked at at a time.

Weights and sums need each δ_i once or twice, never all at once: what the server holds is O(d P + chunk P), however many clients reply.
A chunk is as many rows as make ``spill.CHUNK`` bytes, so that a round of small adapters is one product.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from fedmerge_peft import spill
from fedmerge_peft.strategies.base import Reply


def in_order(replies: Iterable[Reply]) -> tuple[list[Reply], Tensor, Tensor]:
    """The replies in the order of their clients, who these are ``(k,)``, and their sizes ``(k,)`` float64.

    Sorted, so that floating-point sums do not depend on which client was quicker.
    """
    ordered = sorted(replies, key=lambda reply: reply.client)
    clients = torch.tensor([reply.client for reply in ordered])
    return ordered, clients, torch.tensor([reply.size for reply in ordered], dtype=torch.float64)


def chunks(replies: Sequence[Reply]) -> Iterator[tuple[slice, Tensor]]:
    """Which replies, and their first deltas ``(c, P)``, chunk after chunk."""
    rows = max(1, spill.CHUNK // (4 * replies[0].delta.numel()))
    for start in range(0, len(replies), rows):
        part = slice(start, start + rows)
        yield part, spill.side_by_side([reply.delta for reply in replies[part]])


def combined(shares: Tensor, replies: Sequence[Reply]) -> Tensor:
    """Σ_i s_ij δ_i of first deltas, ``(d, P)`` float32, for shares s ``(k, d)`` in the order of the replies; at least one."""
    if not replies:
        raise ValueError("no client replied")
    total = torch.zeros(shares.shape[1], replies[0].delta.numel())
    for part, deltas in chunks(replies):
        total.addmm_(shares[part].T.to(deltas), deltas)
    return total
