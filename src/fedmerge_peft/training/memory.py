"""Number of clients in one training pass that a GPU's free memory allows."""

from __future__ import annotations

import copy
import logging

import torch

from fedmerge_peft.errors import FedMergeError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.training.estimate import estimate
from fedmerge_peft.training.runtime import Runtime

log = logging.getLogger(__name__)

_USABLE = 0.85
"""Fraction of the free memory that a pass may use. The rest is a reserve for fragmentation and for
the error of the estimate."""


def clients_that_fit(runtime: Runtime, recipe: Recipe, count: int) -> int:
    """Return ``count``, halved until a training pass with this number of clients fits into memory.

    Only a number that ``training.clients_per_batch: auto`` has chosen is reduced, and only on a
    CUDA GPU. The smallest result is 1, even if a pass with one client does not fit. The estimate
    assumes that all examples are as long as the longest one. If the memory of the task cannot be
    estimated, ``count`` is returned. The engine also reduces the number after a pass has run out of
    memory.

    Args:
        runtime: The loaded model and the examples.
        recipe: The run's recipe.
        count: Number of clients in one pass, if memory suffices.
    """
    free = free_memory(runtime.device)
    if free is None or recipe.training.clients_per_batch != "auto":
        return count
    length, fitting = int(runtime.examples.lengths.max()), count
    while fitting > 1:
        try:
            needed = estimate(
                recipe,
                copy.deepcopy(runtime.backbone.model.config),
                length=length,
                device=runtime.device.type,
                clients=fitting,
            )
        except FedMergeError:
            return count
        if needed.adapters + needed.training <= _USABLE * free:
            break
        fitting //= 2
    if fitting < count:
        log.info(
            "a training pass has %d client%s instead of %d, because of the GPU's memory",
            fitting,
            "s" * (fitting > 1),
            count,
        )
    return fitting


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a CUDA device; None for other devices.

    Memory that torch has reserved but does not use counts as free.
    """
    if device.type != "cuda":
        return None
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held
