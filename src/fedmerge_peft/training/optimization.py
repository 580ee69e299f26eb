"""Steps, optimizer, learning rate and gradient scaler of one client's local training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import DeviceError
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.util.extras import install_command
from fedmerge_peft.util.seeds import derive

if TYPE_CHECKING:
    from accelerate import Accelerator


def count_steps(examples: int, training: TrainingRecipe) -> int:
    """Return the number of optimizer steps of one client in one phase of local training.

    Raises:
        ValueError: ``training.epochs`` is auto (``hyperparameters.py``), and ``training.steps`` is
            not set.
    """
    if training.steps is not None:
        return training.steps
    if training.epochs == "auto":
        raise ValueError("training.epochs is auto; give the job its hyperparameters")
    per_epoch = math.ceil(examples / (training.batch_size * training.gradient_accumulation))
    return training.epochs * per_epoch


def micro_batches(
    indices: Indices, training: TrainingRecipe, seed: int, phase: int = 0
) -> Iterator[list[Indices]]:
    """Yield the micro-batches of each optimizer step.

    Examples are shuffled in each epoch. The last batch of an epoch may be short.
    """
    purpose = ("order", phase) if phase else ("order",)
    generator = np.random.default_rng(derive(seed, *purpose))
    size, accumulation = training.batch_size, training.gradient_accumulation
    total = count_steps(len(indices), training)
    done = 0
    while done < total:
        order = generator.permutation(indices)
        batches = [order[start : start + size] for start in range(0, len(order), size)]
        for start in range(0, len(batches), accumulation):
            if done == total:
                return
            yield batches[start : start + accumulation]
            done += 1


def learning_rate(training: TrainingRecipe) -> float:
    """Return the learning rate.

    Raises:
        ValueError: ``training.learning_rate`` is auto (``hyperparameters.py``).
    """
    if training.learning_rate == "auto":
        raise ValueError("training.learning_rate is auto; give the job its hyperparameters")
    return training.learning_rate


_BITSANDBYTES = {
    "adamw_8bit": "AdamW8bit",
    "paged_adamw_32bit": "PagedAdamW32bit",
    "paged_adamw_8bit": "PagedAdamW8bit",
}
"""Classes in ``bitsandbytes.optim``, by ``training.optimizer``."""


def check_optimizer(optimizer: str, device: torch.device) -> None:
    """Check that an optimizer of bitsandbytes is installed, and that the device supports it.

    Optimizers of torch are not checked.

    Raises:
        DeviceError: bitsandbytes is missing, or the optimizer does not run on the device.
    """
    if optimizer not in _BITSANDBYTES:
        return
    if device.type not in ("cuda", "cpu"):
        devices = "a CUDA GPU" if optimizer.startswith("paged") else "a CUDA GPU or a CPU"
        raise DeviceError(
            f"training.optimizer: {optimizer} needs {devices}, but this run uses {device.type}; "
            "use adamw"
        )
    if optimizer.startswith("paged") and device.type != "cuda":
        unpaged = "adamw_8bit" if mixes_rows(optimizer) else "adamw"
        raise DeviceError(
            f"training.optimizer: {optimizer} moves its state between a CUDA GPU and the CPU, but "
            f"this run uses {device.type}; use {unpaged}"
        )
    if find_spec("bitsandbytes") is None:
        raise DeviceError(
            f"training.optimizer: {optimizer} needs bitsandbytes: {install_command('quantization')}"
        )


def mixes_rows(optimizer: str) -> bool:
    """Return True if a step on one adapter depends on other adapters in the same tensor.

    Optimizer states of 8 bits have one scale for each block of numbers, and a block may span two
    adapters. Each adapter then needs its own optimizer.
    """
    return optimizer in _BITSANDBYTES and optimizer.endswith("8bit")


def make_optimizer(
    parameter: torch.nn.Parameter, training: TrainingRecipe, *, skips: bool = False
) -> torch.optim.Optimizer:
    """Return a new optimizer for flat adapters, ``(K, P)``.

    Optimizers are elementwise, so that a step on flat rows equals separate steps on the tensors of
    each row. Optimizers for which ``mixes_rows`` is True are exceptions.

    Args:
        parameter: The adapters, with their gradient.
        training: Optimizer and its settings.
        skips: True if a gradient scaler may skip steps.
    """
    rate = learning_rate(training)
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            [parameter], lr=rate, weight_decay=training.weight_decay, fused=True
        )
    if training.optimizer in _BITSANDBYTES:
        kind = getattr(import_module("bitsandbytes.optim"), _BITSANDBYTES[training.optimizer])
        made: torch.optim.Optimizer = kind([parameter], lr=rate, weight_decay=training.weight_decay)
        return made
    sgd = torch.optim.SGD(
        [parameter],
        lr=rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        fused=True,
    )
    if skips and training.momentum:
        # If the first step is skipped, torch's fused SGD never initializes its momentum. A momentum
        # of zero makes no difference otherwise.
        sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingRecipe, steps: int) -> Any:
    """Return the learning-rate schedule of one phase of local training."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=math.ceil(training.warmup * steps),
        num_training_steps=steps,
    )


def new_scaler(accelerator: Accelerator) -> torch.amp.GradScaler | None:
    """Return a new gradient scaler in fp16, and None in other precisions.

    Each adapter gets its own scaler. No client then inherits the loss scale of another client, and
    only a client whose gradients overflow skips its step.
    """
    if accelerator.scaler is None:
        return None
    return torch.amp.GradScaler(accelerator.device.type)
