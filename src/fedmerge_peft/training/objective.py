"""Training loss of one client: offsets of the logits, and weights of the classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge_peft.tasks.base import Task


@dataclass(frozen=True)
class Objective:
    """Offsets and weights with which one client's training loss differs from the task's loss."""

    offset: Tensor | None = None
    """Offsets that are added to the logits, ``(classes,)``; None if all are 0."""
    class_weights: Tensor | None = None
    """Weights of the classes, ``(classes,)``; None if all are 1."""

    def divisor(self, task: Task, labels: Tensor) -> float:
        """Return the divisor of the summed losses of a batch with these labels."""
        return task.loss_divisor(labels, spread([self], len(labels), labels.device))


PLAIN = Objective()


def training_losses(
    task: Task, logits: Tensor, labels: Tensor, objectives: Sequence[Objective]
) -> Tensor:
    """Compute the summed loss (nats) of each example of a batch with equal parts for K clients.

    Args:
        task: Task.
        logits: Output of ``Task.forward`` for K · width examples.
        labels: Their labels.
        objectives: Training loss of each client.

    Returns:
        ``(K, width)``.
    """
    clients = len(objectives)
    logits = shifted(logits, [objective.offset for objective in objectives])
    if not task.in_batch:
        weights = spread(objectives, len(labels) // clients, logits.device)
        return task.training_losses(logits, labels, weights).view(clients, -1)
    parts = zip(logits.chunk(clients), labels.chunk(clients), strict=True)
    return torch.stack([task.training_losses(own, targets, None) for own, targets in parts])


def spread(objectives: Sequence[Objective], width: int, device: torch.device) -> Tensor | None:
    """Return the class weights of each example of K parts, ``(K · width, classes)``.

    Return None if all weights are 1.
    """
    known = [objective.class_weights for objective in objectives]
    first = next((weights for weights in known if weights is not None), None)
    if first is None:
        return None
    rows = torch.stack(
        [torch.ones_like(first) if weights is None else weights for weights in known]
    )
    return rows.to(device).repeat_interleave(width, dim=0)


def shifted(logits: Tensor, offsets: Sequence[Tensor | None]) -> Tensor:
    """Add offset k ``(classes,)`` to part k of K equal parts of logits ``(K · width, classes)``."""
    if all(offset is None for offset in offsets):
        return logits
    parts = zip(logits.chunk(len(offsets)), offsets, strict=True)
    return torch.cat([part if offset is None else part + offset for part, offset in parts])
