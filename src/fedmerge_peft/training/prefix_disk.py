"""Location of the prefix cache on disk, and the conditions under which states are bit-identical."""

from __future__ import annotations

import logging
import os
import platform

import torch

from fedmerge_peft.data.loading import IN_MEMORY
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.util.processor import processor
from fedmerge_peft.util.tensor_cache import TensorCache, cache_folder

log = logging.getLogger(__name__)

DISK_VARIABLE = "FEDMERGE_PREFIX_DISK"
_FORMAT = 1
"""Version of the format of stored states."""


def disk_cache(recipe: Recipe) -> TensorCache | None:
    """Return the cache on disk for this recipe, or None.

    The environment variable ``FEDMERGE_PREFIX_DISK`` (in GB) replaces the recipe's limit. The
    result is None if the limit is 0, or if there is no folder for caches (``cache_folder``). It is
    None for examples in memory unless the variable is set, so that examples which were never on a
    disk are not written to one. It is also None for models with custom code and for models in
    memory, because the weights and settings of these models do not determine the states.

    Raises:
        RecipeError: The variable is not a number of GB from 0 to 1e6.
    """
    in_memory = recipe.data.path.partition(":")[0] == IN_MEMORY
    gigabytes = 0.0 if in_memory else recipe.training.prefix_disk
    if text := os.environ.get(DISK_VARIABLE):
        try:
            gigabytes = float(text)
        except ValueError:
            gigabytes = -1.0
        if not 0 <= gigabytes <= 1e6:
            raise RecipeError(
                f"{DISK_VARIABLE}: expected a number of GB from 0 to 1e6, found {text!r}"
            )
    own_code = recipe.backbone.trust_remote_code or recipe.backbone.model.startswith("memory:")
    if gigabytes == 0 or own_code:
        return None
    try:
        folder = cache_folder() / "prefix"
    except RuntimeError:  # the user has no home directory
        log.warning(
            "the frozen layers' states are not kept on disk, because the user has no home "
            "directory; set FEDMERGE_CACHE to a folder"
        )
        return None
    return TensorCache(folder, gigabytes * 1e9)


def computation(device: torch.device) -> list[str]:
    """Return the properties of libraries, processor and settings that affect rounding."""
    import transformers

    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{platform.machine()} {processor()} {torch.backends.cpu.get_cpu_capability()}"
    )
    autocast = torch.is_autocast_enabled(device.type)
    return [
        f"format {_FORMAT}",
        f"torch {torch.__version__}",
        f"transformers {transformers.__version__}",
        f"{device.type} {name}",
        f"{torch.get_num_threads()} threads",
        f"autocast {torch.get_autocast_dtype(device.type) if autocast else None}",
        f"matmul precision {torch.get_float32_matmul_precision()}",
        f"deterministic {torch.are_deterministic_algorithms_enabled()}",
    ]
