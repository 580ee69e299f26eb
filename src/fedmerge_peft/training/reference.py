"""Training one client on the plain PEFT model: the path that every other one is held against."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.recipe.schema import TrainingRecipe
from fedmerge_peft.tasks.base import Batch, Examples, Task
from fedmerge_peft.training.plan import Train
from fedmerge_peft.training.prefix_cache import PrefixCache, through
from fedmerge_peft.util.seeds import derive, seeded

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Trained:
    """What local training gives."""

    row: Tensor
    """The trained adapter, ``(P,)`` float32 on the CPU."""
    loss: float
    """Mean loss (nats) over the steps, without the proximal term."""
    steps: int


def train(
    backbone: Backbone,
    task: Task,
    training: TrainingRecipe,
    accelerator: Accelerator,
    job: Train,
    examples: Examples,
    indices: Indices,
    seed: int,
    cache: PrefixCache | None = None,
) -> Trained:
    """Train one adapter on one client's examples: min_θ ℓ(θ) + μ ‖θ − anchor‖².

    Args:
        backbone: The model; its slot holds the trained adapter afterwards.
        task: Gives batches and losses.
        training: Optimizer, schedule, batch size and the rest.
        accelerator: Autocast, and the gradient scaler in fp16.
        job: θ as sent, and what of it trains.
        examples: The encoded table.
        indices: The client's rows of it.
        seed: Decides the order of examples and the dropout masks.
        cache: Spares the layers before the first that trains.
    """
    device = backbone.device
    sent = job.row.to(device)
    backbone.load_row(sent)
    anchor = sent if job.anchor is None else job.anchor.to(device)
    proximal = training.proximal if job.proximal is None else job.proximal
    example_weights = spread(job.example_weights, indices, len(examples))
    gradient = backbone.flat.grad
    assert gradient is not None  # noqa: S101 (the backbone keeps it for good; this tells the type checker)
    gradient.zero_()  # an interrupted client may have left something
    total = count_steps(len(indices), training)
    losses: list[Tensor] = []

    def take(
        step: list[Indices], optimizer: torch.optim.Optimizer, scaler: Any, columns: Tensor | None
    ) -> None:
        losses.append(
            accumulate(backbone, task, accelerator, examples, step, example_weights, cache)
        )
        if scaler is not None:
            scaler.unscale_(optimizer)
        if proximal:
            gradient.add_(backbone.flat.detach() - anchor, alpha=2 * proximal)
        if columns is not None:
            gradient.mul_(columns)
        if training.max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([backbone.flat], training.max_grad_norm)
        before = backbone.flat.detach().clone() if columns is not None else None
        if scaler is not None:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        if (
            columns is not None and before is not None
        ):  # weight decay would move what does not train
            backbone.flat.data.copy_(torch.where(columns, backbone.flat.data, before))
        gradient.zero_()

    backbone.train()
    with seeded(derive(seed, "dropout"), device):
        for phase, mask in enumerate(job.phases):
            optimizer = make_optimizer(backbone.flat, training)
            schedule = make_schedule(optimizer, training, total)
            scaler = _fresh_scaler(accelerator)
            for step in steps(indices, training, seed, phase):
                take(step, optimizer, scaler, None if mask is None else mask.to(device))
                schedule.step()
    backbone.eval()
    return Trained(backbone.row(), float(torch.stack(losses).mean()), len(losses))


def spread(weights: Tensor | None, indices: Indices, examples: int) -> Tensor | None:
    """A client's example weights ``(n,)``, by row of the whole table."""
    if weights is None:
        return None
    spread = torch.zeros(examples)
    spread[torch.from_numpy(indices)] = weights
    return spread


def accumulate(
    backbone: Backbone,
    task: Task,
    accelerator: Accelerator,
    examples: Examples,
    step: list[Indices],
    example_weights: Tensor | None = None,
    cache: PrefixCache | None = None,
) -> Tensor:
    """Add the gradient of the step's mean loss to ``flat.grad``, one micro-batch after another; returns that mean.

    The mean runs over all terms (examples, or labelled tokens) of the step, so it does not depend on how they are split.
    """
    device = backbone.device
    batches = [task.collate(examples, chunk) for chunk in step]
    sums = torch.zeros((), device=device)
    count = sum(float(task.count_terms(batch["labels"])) for batch in batches)
    for chunk, batch in zip(step, batches, strict=True):
        labels, inputs = split(batch, device)
        with accelerator.autocast(), through(cache, chunk):
            logits = backbone.model(**inputs).logits
        each = task.losses(logits, labels)[0]
        if example_weights is not None:
            each = each * example_weights[torch.from_numpy(chunk)].to(device)
        summed = each.sum()
        accelerator.backward(summed / count)
        sums += summed.detach()
    return sums / count


def split(batch: Batch, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Labels, and the model's inputs, on the device. The labels stay out of the model: its own loss would mix clients."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    return inputs.pop("labels"), inputs


def count_steps(examples: int, training: TrainingRecipe) -> int:
    """Optimizer steps of one client in one round."""
    per_epoch = math.ceil(examples / (training.batch_size * training.gradient_accumulation))
    return training.steps if training.steps is not None else training.epochs * per_epoch


def steps(
    indices: Indices, training: TrainingRecipe, seed: int, phase: int = 0
) -> Iterator[list[Indices]]:
    """The micro-batches of each optimizer step; examples in a new order each epoch, the last batch as short as it is."""
    generator = np.random.default_rng(
        derive(seed, "order", phase) if phase else derive(seed, "order")
    )
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


def make_optimizer(
    parameter: torch.nn.Parameter, training: TrainingRecipe
) -> torch.optim.Optimizer:
    """A new optimizer on the flat adapter: its steps are elementwise, so they equal those on the separate tensors."""
    if training.optimizer == "adamw":
        return torch.optim.AdamW(
            [parameter], lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
        )
    return torch.optim.SGD(
        [parameter],
        lr=training.learning_rate,
        momentum=training.momentum,
        weight_decay=training.weight_decay,
        fused=True,
    )


def make_schedule(optimizer: torch.optim.Optimizer, training: TrainingRecipe, steps: int) -> Any:
    """The learning rate within one round."""
    from transformers import get_scheduler

    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    return get_scheduler(
        name,
        optimizer,
        num_warmup_steps=math.ceil(training.warmup * steps),
        num_training_steps=steps,
    )


def _fresh_scaler(accelerator: Accelerator) -> Any:
    """fp16's gradient scaler, at its start: what one client's losses taught it must not reach the next."""
    if accelerator.scaler is None:
        return None
    accelerator.scaler = torch.amp.GradScaler("cuda")
    return accelerator.scaler
