"""Measuring what a client is served with on its own examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmerge_peft.backbone import Backbone
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.tasks.base import Examples, Predictions, Task
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.training.plan import Mixture, Served
from fedmerge_peft.training.reference import Indices, split

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    backbone: Backbone, task: Task, accelerator: Accelerator, served: Served, examples: Examples, indices: Indices, batch_size: int
) -> dict[str, float]:
    """Loss (nats) and metrics on these rows: ``{"loss": ..., "accuracy": ...}``. Raises ``RecipeError`` for text from a mixture."""
    predictions = Predictions()
    for chunk, logits, labels in _forward(backbone, task, accelerator, served, examples, indices, batch_size):
        sums, counts = task.losses(logits, labels)
        predicted, expected = task.predict(logits, labels)
        predictions.loss_sum += float(sums.double().sum())
        predictions.count += float(counts.sum())
        predictions.predicted += predicted.tolist()
        predictions.expected += expected.tolist()
        if task.generates:
            if isinstance(served, Mixture):
                raise RecipeError(["task.metrics: a mixture of models does not generate text; use perplexity or accuracy with it"])
            with accelerator.autocast():
                generated, wanted = task.generate(backbone.model, examples, chunk, backbone.device)
            predictions.generated += generated
            predictions.wanted += wanted
    return score(task.metrics, predictions)


@torch.no_grad()
def example_losses(
    backbone: Backbone, task: Task, accelerator: Accelerator, row: Tensor, examples: Examples, indices: Indices, batch_size: int
) -> Tensor:
    """Each example's summed loss (nats) with this adapter, ``(n,)`` float32 on the CPU, in the order of the indices."""
    batches = _forward(backbone, task, accelerator, row, examples, indices, batch_size)
    return torch.cat([task.losses(logits, labels)[0].cpu() for _, logits, labels in batches])


def _forward(
    backbone: Backbone, task: Task, accelerator: Accelerator, served: Served, examples: Examples, indices: Indices, batch_size: int
) -> Iterator[tuple[Indices, Tensor, Tensor]]:
    """Rows, logits and labels, batch after batch. A mixture's logits are its log-probabilities."""
    backbone.eval()
    if isinstance(served, Tensor):
        backbone.load_row(served)
    for start in range(0, len(indices), batch_size):
        chunk = indices[start : start + batch_size]
        labels, inputs = split(task.collate(examples, chunk), backbone.device)
        with accelerator.autocast():
            logits = _mixed(backbone, served, inputs) if isinstance(served, Mixture) else backbone.model(**inputs).logits
        yield chunk, logits, labels


def _mixed(backbone: Backbone, mixture: Mixture, inputs: dict[str, Tensor]) -> Tensor:
    """The mixture's log-probabilities, log Σ_k π_k softmax(logits_k)."""
    parts = []
    for row, weight in zip(mixture.rows, mixture.weights, strict=True):
        backbone.load_row(row)
        parts.append(torch.log_softmax(backbone.model(**inputs).logits.float(), dim=-1) + weight.log().to(backbone.device))
    return torch.logsumexp(torch.stack(parts), dim=0)
