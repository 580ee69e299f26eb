"""One Accelerator a process: the device and the precision of everything that is trained."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from fedmerge_peft import distributed
from fedmerge_peft.errors import DeviceError
from fedmerge_peft.recipe.schema import TrainingRecipe

if TYPE_CHECKING:
    from accelerate import Accelerator

_HINT = "use training.device=cpu, or auto to take what there is"
_PATIENCE = timedelta(days=7)
"""How long a rank waits for another. One that has ended is noticed without; one that trains on may take as long as it takes."""


def choose_device(wanted: str) -> torch.device:
    """The device that a recipe's ``training.device`` names; for each of several ranks one of its own.

    Raises ``DeviceError`` where it is absent.
    """
    if distributed.launched_processes() > 1:
        return _of_this_rank(wanted)
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise DeviceError(
            f"training.device: {wanted!r} is no device; use auto, cpu, mps, cuda or cuda:1"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"training.device: {wanted} was asked for, and this machine has no CUDA GPU; {_HINT}"
            )
        if (device.index or 0) >= torch.cuda.device_count():
            raise DeviceError(
                f"training.device: {wanted} was asked for, and this machine has {torch.cuda.device_count()} GPU(s)"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"training.device: mps was asked for, and this machine has none; {_HINT}")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(
            f"training.device: {wanted} is not supported; use auto, cpu, mps, cuda or cuda:1"
        )
    return device


def _of_this_rank(wanted: str) -> torch.device:
    if wanted not in ("auto", "cpu", "cuda"):
        raise DeviceError(
            f"training.device: {wanted} is one device, and {distributed.launched_processes()} ranks were started; use auto, cuda or cpu"
        )
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= (found := torch.cuda.device_count()):
        error = DeviceError(
            f"training.device: rank {distributed.rank()} finds no GPU of its own: this machine has {found}; start as many ranks"
        )
        error.rank = distributed.rank()
        raise error
    return torch.device("cuda", index)


def choose_precision(wanted: str, device: torch.device) -> str:
    """``no``, ``bf16`` or ``fp16``. Raises ``DeviceError`` for fp16 away from a GPU, where it would silently be float32."""
    if wanted == "fp16" and device.type != "cuda":
        raise DeviceError(
            f"training.mixed_precision: fp16 needs a CUDA GPU, and this run is on {device.type}; use bf16, no or auto"
        )
    if wanted != "auto":
        return wanted
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def make_accelerator(training: TrainingRecipe) -> Accelerator:
    """The process's Accelerator for this device and precision; with it the ranks come together. Raises ``DeviceError``.

    Accelerate keeps its state for the whole process and refuses a second precision; a notebook that tries several wants
    just that, so state of another precision is put aside first.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    device = choose_device(training.device)
    precision = choose_precision(training.mixed_precision, device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if AcceleratorState._shared_state:
        current = AcceleratorState()
        if current.mixed_precision != precision or current.device.type != device.type:
            AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)],
    )
