"""Number of adapters that share a forward pass, and the trial that decides whether they can."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch

from fedmerge_peft.data.clients import Client, Indices
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError, RecipeError
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack, stacking_obstacle
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.models.placement import is_distributed
from fedmerge_peft.recipe.evaluation import EvaluationRecipe
from fedmerge_peft.recipe.schema import Recipe, TrainingRecipe
from fedmerge_peft.tasks.base import Task
from fedmerge_peft.training.gradients import accumulate
from fedmerge_peft.training.runtime import Runtime, SharingTrial
from fedmerge_peft.util.seeds import seeded

log = logging.getLogger(__name__)

_FEWEST, _MOST = 3, 16
"""Smallest and largest number of adapters that ``auto`` puts into a shared pass. Two adapters would
save too little time (3 % on a CPU)."""
_EXAMPLES = {"cpu": 8, "cuda": 256}
"""Largest number of examples in a shared pass with ``auto``, by type of device. On a CPU, larger
passes cost more in padding than they save."""


def check_task(task: Task, recipe: Recipe, clients: Sequence[Client]) -> None:
    """Check that the task supports the strategies and the batch size.

    Warn of clients with too few examples for the task's loss.

    Raises:
        RecipeError: ``training.batch_size`` is too small; or a strategy mixes the outputs of
            several adapters, but the task does not support mixtures.
        DataError: All clients with training examples have fewer than ``task.smallest_batch``.
    """
    mixing = [
        strategy for strategy in (recipe.strategy, *recipe.baselines) if not strategy.single_adapter
    ]
    if mixing and not task.mixes:
        baseline = mixing[0] is not recipe.strategy
        raise RecipeError(
            f"{'baselines' if baseline else 'strategy'}: {mixing[0].name} mixes the outputs of "
            f"several adapters, which the task {recipe.task.name} does not support; "
            f"{'remove this baseline' if baseline else 'use another strategy'}"
        )
    least = task.smallest_batch
    if recipe.training.batch_size < least:
        raise RecipeError(
            f"training.batch_size: found {recipe.training.batch_size}, but this task compares "
            f"the examples of a batch; use {least} or more"
        )
    small = [client.name for client in clients if 0 < client.size < least]
    if small and len(small) == sum(client.size > 0 for client in clients):
        raise DataError(
            f"each client has fewer than {least} training examples, but this task compares the "
            "examples of a client; use fewer clients, or more data"
        )
    if small:
        log.warning(
            "this task compares the examples of a client, so clients with fewer than %d training "
            "examples learn nothing (%d of %d): %s",
            least,
            len(small),
            len(clients),
            join_values(small),
        )


def clients_per_batch(runtime: Runtime, training: TrainingRecipe, rows: Indices) -> int:
    """Return the number of adapters to train in one pass.

    It is the recipe's number, or 1 if ``sharing_obstacle`` finds an obstacle, which is logged.

    Args:
        runtime: Model, task and examples.
        training: ``clients_per_batch`` and the batch size.
        rows: Rows of the table that belong to clients.
    """
    large = is_quantized(runtime.backbone) or is_distributed(runtime.backbone.model)
    count = requested_clients(training, runtime.device.type, large=large)
    if count == 1:
        return 1
    if (reason := sharing_obstacle(runtime, rows)) is not None:
        log.info("clients train one at a time: %s", reason)
        return 1
    return count


def evaluated_together(runtime: Runtime, evaluation: EvaluationRecipe, rows: Indices) -> int:
    """Return the largest number of adapters to evaluate in one pass.

    It is the recipe's number, or 1 if there is an obstacle, which is logged.

    Args:
        runtime: Model, task and examples.
        evaluation: ``clients_per_batch``.
        rows: Rows of the table that belong to clients.
    """
    count = evaluation.clients_per_batch
    if count == "auto":
        count = _MOST if runtime.device.type == "cuda" else 1
    if count == 1:
        return 1
    task, reason = runtime.task, None
    if task.in_batch:
        reason = "the task compares the examples of a client"
    elif task.generates and task.prompt_padding in ("none", "alone"):
        reason = "the outputs depend on padding or on other inputs, so not all prompts share a pass"
    if (reason := reason or sharing_obstacle(runtime, rows)) is not None:
        log.info("clients are evaluated one at a time: %s", reason)
        return 1
    return count


def requested_clients(training: TrainingRecipe, device: str, *, large: bool = False) -> int:
    """Return the number of adapters in one pass that a recipe requests for a type of device.

    With ``auto``, it is 1 for a large model, whose weights are quantized or on several GPUs:
    there is usually little memory for activations.
    """
    if training.clients_per_batch != "auto":
        return training.clients_per_batch
    if large:
        return 1
    count = min(_MOST, _EXAMPLES.get(device, 8) // training.batch_size)
    return count if count >= _FEWEST else 1


def sharing_obstacle(runtime: Runtime, rows: Indices) -> str | None:
    """Return the reason why adapters cannot share a pass of the model, or None.

    The task's padding and the model's modules are checked first. A trial on two examples then
    compares the gradients of one shared pass with the gradients of separate passes. The runtime
    keeps the result.

    Args:
        runtime: Model, task and examples.
        rows: Rows of the table that belong to clients.
    """
    if runtime.sharing_trial is None:
        if runtime.task.padding in ("none", "alone"):
            reason: str | None = (
                "the outputs depend on padding or on other inputs, so not all examples share a pass"
            )
        else:
            reason = stacking_obstacle(runtime.backbone) or _disagreement(runtime, rows)
        runtime.sharing_trial = SharingTrial(reason)
    return runtime.sharing_trial.obstacle


def is_quantized(backbone: Backbone) -> bool:
    """Return True if the frozen weights have 8 or 4 bits."""
    return bool(getattr(backbone.model, "is_quantized", False))


def _disagreement(runtime: Runtime, rows: Indices) -> str | None:
    """Compare the gradients of two adapters from one shared pass and from separate passes.

    The trial uses the shortest and the longest example.

    Returns:
        The reason why the adapters cannot share a pass, or None.
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
        except Exception as error:  # models whose layers do not keep the shape (batch, ..., width)
            return f"the model does not run with several adapters ({type(error).__name__}: {error})"
        exact = (
            runtime.accelerator.mixed_precision == "no"
            and backbone.model.dtype == torch.float32
            and not is_quantized(backbone)  # computes in bfloat16
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
                    "or apply adapters in an unsupported way"
                )
        backbone.load_row(held)
    return None
