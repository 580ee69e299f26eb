"""The gradient of one optimizer step, for one adapter or for several in the same passes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.adapter_slot import AdapterSlot
from fedmerge_peft.models.adapter_stack import AdapterStack
from fedmerge_peft.training.features import captured_features, penalties
from fedmerge_peft.training.plan import Alignment
from fedmerge_peft.training.runtime import Runtime


def accumulate(
    runtime: Runtime,
    adapters: AdapterSlot | AdapterStack,
    steps: Sequence[Sequence[Indices]],
    example_weights: Sequence[Tensor | None] | None = None,
    alignments: Sequence[Alignment | None] | None = None,
    offsets: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Add the gradient of each adapter's mean loss to ``adapters.gradient``.

    The mean is taken over all terms (examples, or labeled tokens) of an adapter's step, regardless
    of its division into micro-batches. Call this function within ``adapters.applied()``.

    Args:
        runtime: Model, task and examples.
        adapters: K adapters.
        steps: For each adapter, the micro-batches of one step, as rows of the table.
        example_weights: For each adapter, the weight of each row of the table, ``(n,)``; None for
            1.
        alignments: For each adapter, the penalty on the features; None for none.
        offsets: For each adapter, what is added to the logits, ``(classes,)``; None for 0.

    Returns:
        The mean losses (nats) without penalties, ``(K,)``.
    """
    weights = example_weights or [None] * len(steps)
    aligned = alignments or [None] * len(steps)
    shifts = offsets or [None] * len(steps)
    with ExitStack() as stack:
        features: list[Tensor] = []
        if any(alignment is not None for alignment in aligned):
            features = stack.enter_context(captured_features(runtime.backbone))
        if isinstance(adapters, AdapterSlot):
            ((step,), (own,), (alignment,), (offset,)) = (steps, weights, aligned, shifts)
            return _accumulate_one(runtime, adapters, step, own, alignment, features, offset)[None]
        return _accumulate_stack(runtime, adapters, steps, weights, aligned, features, shifts)


def _accumulate_one(
    runtime: Runtime,
    slot: AdapterSlot,
    step: Sequence[Indices],
    weights: Tensor | None,
    alignment: Alignment | None,
    features: list[Tensor],
    offset: Tensor | None,
) -> Tensor:
    step = [part for chunk in step for part in runtime.parts(chunk)]
    batches = [runtime.collate(chunk) for chunk in step]
    count = sum(float(runtime.task.count_terms(batch["labels"])) for batch in batches)
    total = torch.zeros((), device=runtime.device)
    for chunk, batch in zip(step, batches, strict=True):
        labels, inputs = runtime.to_device(batch)
        logits = shifted(runtime.logits(slot.model, chunk, inputs, labels), [offset])
        losses = runtime.task.losses(logits, labels)[0]
        if weights is not None:
            losses = losses * weights[torch.from_numpy(chunk)].to(runtime.device)
        summed = losses.sum()
        objective = summed
        if alignment is not None:
            objective = summed + penalties(alignment, features.pop(), labels).sum()
        runtime.accelerator.backward(objective / count)
        total += summed.detach()
    return total / count


def _accumulate_stack(
    runtime: Runtime,
    stack: AdapterStack,
    steps: Sequence[Sequence[Indices]],
    example_weights: Sequence[Tensor | None],
    alignments: Sequence[Alignment | None],
    features: list[Tensor],
    offsets: Sequence[Tensor | None],
) -> Tensor:
    """Run the n-th micro-batches of all adapters in one pass.

    Shorter batches are filled up with examples of weight 0.
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
            counts[k] += runtime.task.count_terms(
                batch["labels"][k * width : k * width + len(chunk)]
            )
            weights[k, : len(chunk)] = 1.0 if own is None else own[torch.from_numpy(chunk)]
        passes.append((rows, batch, weights))
    means = torch.zeros(len(stack), device=stack.rows.device)
    divisors = torch.from_numpy(counts)[:, None]
    for rows, batch, weights in passes:
        labels, inputs = runtime.to_device(batch)
        logits = shifted(runtime.logits(stack.model, rows, inputs, labels, len(stack)), offsets)
        losses = _losses_by_adapter(runtime, logits, labels, len(stack))
        shares = (weights / divisors).to(losses)
        parts = (losses * shares).sum(dim=1)
        objective = parts.sum()
        if features:
            by_adapter = zip(
                alignments,
                features.pop().chunk(len(stack)),
                labels.chunk(len(stack)),
                shares,
                strict=True,
            )
            for alignment, part, targets, own in by_adapter:
                if alignment is not None:
                    objective = objective + (penalties(alignment, part, targets) * own).sum()
        stack.backward(objective)
        means += parts.detach()
    return means


def _losses_by_adapter(runtime: Runtime, logits: Tensor, labels: Tensor, adapters: int) -> Tensor:
    """Return the losses of K equal parts of a batch, ``(K, width)``."""
    if not runtime.task.in_batch:
        return runtime.task.losses(logits, labels)[0].view(adapters, -1)
    parts = zip(logits.chunk(adapters), labels.chunk(adapters), strict=True)
    return torch.stack([runtime.task.losses(own, targets)[0] for own, targets in parts])


def shifted(logits: Tensor, offsets: Sequence[Tensor | None]) -> Tensor:
    """Add offset k ``(classes,)`` to part k of K equal parts of logits ``(K · width, classes)``."""
    if all(offset is None for offset in offsets):
        return logits
    parts = zip(logits.chunk(len(offsets)), offsets, strict=True)
    return torch.cat([part if offset is None else part + offset for part, offset in parts])
