"""Number of adapters that train in one forward pass, and the trial that decides it."""

from __future__ import annotations

import logging

import numpy as np
import torch

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.runtime import Runtime
from fedmerge_peft.util.seeds import seeded

log = logging.getLogger(__name__)

_FEWEST, _MOST = 3, 16
"""Adapters that ``auto`` puts into one pass; two save too little (3 % on a CPU)."""
_EXAMPLES = {"cpu": 8, "cuda": 256}
"""Examples that ``auto`` brings a pass to. On a CPU, padding outweighs what larger passes save."""


def clients_per_batch(runtime: Runtime, training: TrainingRecipe, rows: Indices) -> int:
    """Return how many adapters to train in one pass: the recipe's number, or 1 if not exact.

    The reason for 1 goes to the log. Beyond what the modules tell, a trial of two examples decides:
    gradients computed together and alone have to agree.

    Args:
        runtime: Model, task and examples.
        training: ``clients_per_batch`` and the batch size.
        rows: The rows of the table that clients hold.
    """
    wanted = training.clients_per_batch
    if wanted == "auto":
        examples = _EXAMPLES.get(runtime.device.type, 8)
        count, fewest = min(_MOST, examples // training.batch_size), _FEWEST
    else:
        count, fewest = wanted, 2
    if count < fewest:
        return 1
    if runtime.accelerator.scaler is not None:
        reason: str | None = "fp16's loss scale would be common to all (training.mixed_precision)"
    else:
        reason = stacking_obstacle(runtime.backbone) or _disagreement(runtime, rows)
    if reason is not None:
        log.info("clients train one at a time: %s", reason)
        return 1
    return count


def _disagreement(runtime: Runtime, rows: Indices) -> str | None:
    """Compare gradients of two adapters, computed in one pass and in one pass each.

    The trial uses the shortest and the longest example. Returns the reason if they disagree.
    """
    backbone = runtime.backbone
    sizes = runtime.examples.lengths[rows]
    short, long = rows[[int(sizes.argmin())]], rows[[int(sizes.argmax())]]
    steps = [[short], [np.concatenate([long, short])]]
    backbone.eval()
    held = backbone.row()
    with torch.enable_grad(), seeded(0, backbone.device):
        noise = torch.randn(2, len(held)) * 0.02
        adapters = (held + noise.to(held)).to(backbone.device)  # neither factor is zero
        stack = AdapterStack(backbone, adapters)
        try:
            with stack.applied():
                accumulate(runtime, stack, steps)
        except Exception as error:  # models whose layers do not keep to (batch, ..., width)
            return f"the model does not run with several adapters ({type(error).__name__}: {error})"
        exact = (
            runtime.accelerator.mixed_precision == "no" and backbone.model.dtype == torch.float32
        )
        for adapter, step, together in zip(adapters, steps, stack.gradient, strict=True):
            slot = AdapterSlot(backbone, adapter)
            accumulate(runtime, slot, [step])
            alone = slot.gradient[0]
            agree = bool((together - alone).norm() <= (0.02 if exact else 0.1) * alone.norm())
            alone.zero_()
            if not agree:
                return (
                    "the model's layers mix the examples of a batch, "
                    "or use an adapter in a way of their own"
                )
        backbone.load_row(held)
    return None
