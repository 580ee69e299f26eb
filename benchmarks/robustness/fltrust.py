"""FLTrust (Cao et al. 2021, arXiv 2012.13995), for comparison.

The server trains each adapter on examples of its own, which gives g_j. The trust in client i is
max(0, cos(δ_i, g_j)), and the result is the mean of ‖g_j‖ δ_i / ‖δ_i‖, weighted by trust. The
authors have one adapter, and clients that count the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import normalize

from fedmerge_peft import register_aggregation
from fedmerge_peft.recipe.robustness import RobustnessRecipe


class Server:
    """What the server learns from examples of its own."""

    updates: Callable[[], Tensor]
    """Returns g ``(d, P)``, the updates of the soup's current adapters."""


@register_aggregation("fltrust")
def fltrust(deltas: Tensor, weights: Tensor, recipe: RobustnessRecipe) -> Tensor:
    """Mean of updates of equal length, weighted by their cosines with the server's update."""
    own = Server.updates()
    if len(own) != weights.shape[1]:  # FedMerge's common update of all adapters
        own = own.mean(dim=0, keepdim=True)
    return trusted_mean(deltas, weights, own)


def trusted_mean(deltas: Tensor, weights: Tensor, own: Tensor) -> Tensor:
    """Combine updates ``(k, P)`` with weights ``(k, d)``, given the server's ``(d, P)``."""
    directions = normalize(deltas)
    trust = weights.to(deltas) * (directions @ normalize(own).T).clamp_min(0)
    trust = trust / trust.sum(dim=0).clamp_min(torch.finfo(trust.dtype).tiny)
    return own.norm(dim=1, keepdim=True) * (trust.T @ directions)
