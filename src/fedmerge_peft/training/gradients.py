"""Gradient of one optimizer step, for one adapter or for several in the same passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from torch.amp import GradScaler

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.training.features import captured_features, penalties
from fedmerge_peft.training.objective import PLAIN, Objective, training_losses
from fedmerge_peft.training.plan import Alignment
from fedmerge_peft.training.runtime import Runtime


def accumulate(
    runtime: Runtime,
    adapters: AdapterSlot | AdapterStack,
    steps: Sequence[Sequence[Indices]],
    example_weights: Sequence[Tensor | None] | None = None,
    alignments: Sequence[Alignment | None] | None = None,
    objectives: Sequence[Objective] | None = None,
    scalers: Sequence[GradScaler | None] | None = None,
) -> Tensor:
    """Add the gradient of each adapter's mean loss and penalty to ``adapters.gradient``.

    The mean is taken over all terms (examples, or labeled tokens) of an adapter's step, regardless
    of its division into micro-batches. The divisor is that of ``Objective.divisor``: the number of
    terms or, in some tasks with class weights, the sum of their weights. Example weights multiply
    the losses, but do not change the divisor. Call this function within ``adapters.applied()``.

    Args:
        runtime: Model, task and examples.
        adapters: K adapters.
        steps: For each adapter, the micro-batches of one step, as rows of the table.
        example_weights: For each adapter, the weight of each row of the table, ``(n,)``; None if
            all are 1.
        alignments: For each adapter, the penalty on the features; None if there is none.
        objectives: Training loss of each adapter's client. Default: the task's.
        scalers: For each adapter, the gradient scaler that multiplies its loss before the backward
            pass; None without fp16.

    Returns:
        The mean losses (nats) without penalties, ``(K,)``.

    Raises:
        RecipeError: As in ``PrefixCache.prepare`` and, if there are alignments, as in
            ``captured_features``.
    """
    weights = example_weights or [None] * len(steps)
    aligned = alignments or [None] * len(steps)
    losses = objectives or [PLAIN] * len(steps)
    scales = scalers or [None] * len(steps)
    with ExitStack() as stack:
        features: list[Tensor] = []
        if any(alignment is not None for alignment in aligned):
            features = stack.enter_context(captured_features(runtime.backbone))
        if isinstance(adapters, AdapterSlot):
            parts = zip(steps, weights, aligned, losses, scales, strict=True)
            ((step, own, alignment, loss, scaler),) = parts
            one = _accumulate_one(runtime, adapters, step, own, alignment, features, loss, scaler)
            return one[None]
        return _accumulate_stack(
            runtime, adapters, steps, weights, aligned, features, losses, scales
        )


def _accumulate_one(
    runtime: Runtime,
    slot: AdapterSlot,
    step: Sequence[Indices],
    weights: Tensor | None,
    alignment: Alignment | None,
    features: list[Tensor],
    objective: Objective,
    scaler: GradScaler | None,
) -> Tensor:
    step = [part for chunk in step for part in runtime.parts(chunk)]
    batches = [runtime.collate(chunk) for chunk in step]
    count = sum(objective.divisor(runtime.task, batch["labels"]) for batch in batches)
    total = torch.zeros((), device=runtime.device)
    for chunk, batch in zip(step, batches, strict=True):
        labels, inputs = runtime.to_device(batch)
        logits = runtime.logits(slot.model, chunk, inputs, labels, for_losses=True)
        losses = training_losses(runtime.task, logits, labels, [objective])[0]
        if weights is not None:
            losses = losses * weights[torch.from_numpy(chunk)].to(runtime.device)
        summed = losses.sum()
        minimized = summed
        if alignment is not None:
            minimized = summed + penalties(alignment, features.pop(), labels).sum()
        runtime.backward(minimized / count, scaler)
        total += summed.detach()
    return total / count


def _accumulate_stack(
    runtime: Runtime,
    stack: AdapterStack,
    steps: Sequence[Sequence[Indices]],
    example_weights: Sequence[Tensor | None],
    alignments: Sequence[Alignment | None],
    features: list[Tensor],
    objectives: Sequence[Objective],
    scalers: Sequence[GradScaler | None],
) -> Tensor:
    """Compute the gradients of K adapters. The n-th micro-batches of all adapters share one pass.

    Shorter micro-batches are filled up with examples of weight 0.
    """
    passes = []
    counts = np.zeros(len(stack))
    for number in range(max(len(step) for step in steps)):
        chunks = [step[number] if number < len(step) else step[0][:0] for step in steps]
        width = max(len(chunk) for chunk in chunks)
        pairs = zip(chunks, steps, strict=True)
        filled = [np.resize(chunk if len(chunk) else step[0][:1], width) for chunk, step in pairs]
        rows = np.concatenate(filled)
        batch = runtime.collate(rows)
        weights = torch.zeros(len(stack), width)
        for k, (chunk, own) in enumerate(zip(chunks, example_weights, strict=True)):
            labels = batch["labels"][k * width : k * width + len(chunk)]
            counts[k] += objectives[k].divisor(runtime.task, labels)
            weights[k, : len(chunk)] = 1.0 if own is None else own[torch.from_numpy(chunk)]
        passes.append((rows, batch, weights))
    means = torch.zeros(len(stack), device=stack.rows.device)
    divisors = torch.from_numpy(counts)[:, None]
    for rows, batch, weights in passes:
        labels, inputs = runtime.to_device(batch)
        logits = runtime.logits(stack.model, rows, inputs, labels, len(stack), for_losses=True)
        losses = training_losses(runtime.task, logits, labels, objectives)
        shares = (weights / divisors).to(losses)
        parts = (losses * shares).sum(dim=1)
        minimized = parts
        if features:
            by_adapter = zip(
                alignments,
                features.pop().chunk(len(stack)),
                labels.chunk(len(stack)),
                shares,
                strict=True,
            )
            minimized = torch.stack(
                [
                    mean
                    if alignment is None
                    else mean + (penalties(alignment, part, targets) * own).sum()
                    for mean, (alignment, part, targets, own) in zip(parts, by_adapter, strict=True)
                ]
            )
        stack.backward(_sum_scaled(minimized, scalers))
        means += parts.detach()
    return means


def _sum_scaled(losses: Tensor, scalers: Sequence[GradScaler | None]) -> Tensor:
    """Sum losses ``(K,)``. A loss with a gradient scaler is multiplied by its scale first."""
    return torch.stack(
        [
            loss if scaler is None else scaler.scale(loss)
            for loss, scaler in zip(losses, scalers, strict=True)
        ]
    ).sum()
