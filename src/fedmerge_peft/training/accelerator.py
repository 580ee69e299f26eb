"""Accelerate's ``Accelerator`` of this process: its device and numeric precision."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING

import torch

from fedmerge_peft import distributed
from fedmerge_peft.errors import DeviceError
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.training.optimization import check_optimizer
from fedmerge_peft.util.text import count_of

if TYPE_CHECKING:
    from accelerate import Accelerator

_HINT = "use training.device=cpu, or auto to select an available device"
_TIMEOUT = timedelta(days=7)
"""Longest wait of a rank for another rank. It is long because training may take days. The exit of a
rank is detected independently of this limit."""


def choose_device(requested: str) -> torch.device:
    """Return the device for a recipe's ``training.device``.

    Each of several ranks gets its own GPU, or all of them use the CPU.

    Raises:
        DeviceError: The value is invalid, or this machine does not have the device; or there are
            several ranks, and the value is not auto, cuda or cpu, or there are too few GPUs.
    """
    if distributed.launched_processes() > 1:
        return _rank_device(requested)
    if requested == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(requested)
    except RuntimeError as error:
        raise DeviceError(
            f"training.device: {requested!r} is not a device; use auto, cpu, mps, cuda or cuda:1"
        ) from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(
                f"training.device: {requested} is not available: PyTorch finds no CUDA GPU; {_HINT}"
            )
        if (device.index or 0) >= (count := torch.cuda.device_count()):
            raise DeviceError(
                f"training.device: {requested} is not available: PyTorch finds "
                f"{count_of(count, 'GPU')}, numbered from 0; choose a smaller number, or auto"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"training.device: mps is not available on this machine; {_HINT}")
    elif device.type not in ("cpu", "cuda", "mps"):
        raise DeviceError(
            f"training.device: {requested} is not supported; use auto, cpu, mps, cuda or cuda:1"
        )
    return device


def _rank_device(requested: str) -> torch.device:
    if requested not in ("auto", "cpu", "cuda"):
        raise DeviceError(
            f"training.device: {requested} does not suit {distributed.launched_processes()} ranks, "
            "each of which needs its own GPU or the CPU; use auto, cuda or cpu"
        )
    if requested == "cpu" or (requested == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= (count := torch.cuda.device_count()):
        error = DeviceError(
            f"training.device: rank {distributed.rank()} has no separate GPU: PyTorch finds "
            f"{count_of(count, 'GPU')} on its machine; start at most one rank per GPU, or use "
            "training.device=cpu"
        )
        error.rank = distributed.rank()
        raise error
    return torch.device("cuda", index)


def choose_precision(requested: str, device: torch.device) -> str:
    """Return ``no``, ``bf16`` or ``fp16`` for a recipe's ``training.mixed_precision``.

    Raises:
        DeviceError: fp16 is requested without a CUDA GPU. Training would silently use float32.
    """
    if requested == "fp16" and device.type != "cuda":
        raise DeviceError(
            "training.mixed_precision: fp16 needs a CUDA GPU, "
            f"but this run uses {device.type}; use bf16, no or auto"
        )
    if requested != "auto":
        return requested
    if device.type != "cuda":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


def make_accelerator(training: TrainingRecipe) -> Accelerator:
    """Return this process's ``Accelerator`` for the recipe's device and precision.

    The call also initializes the process group, if there are several ranks.

    Accelerate keeps global state, and rejects a change of the precision. If the type of device or
    the precision has changed, this function resets the state. One process, such as a notebook, can
    therefore run recipes with different devices and precisions.

    Raises:
        DeviceError: The device, the precision or the optimizer is not available.
    """
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.state import AcceleratorState

    device = choose_device(training.device)
    check_optimizer(training.optimizer, device)
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
        kwargs_handlers=[InitProcessGroupKwargs(timeout=_TIMEOUT)],
    )
