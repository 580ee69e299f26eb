"""Measuring what a client is served with on its own examples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.tasks.base import Examples, Predictions, Task
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.training.plan import Mixture, Served
from fedmerge_peft.training.prefix_cache import PrefixCache, through
from fedmerge_peft.training.reference import split

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    backbone: Backbone,
    task: Task,
    accelerator: Accelerator,
    served: Served,
    examples: Examples,
    indices: Indices,
    batch_size: int,
    cache: PrefixCache | None = None,
) -> dict[str, float]:
    """Loss (nats) and metrics on these rows: ``{"loss": ..., "accuracy": ...}``. Raises ``RecipeError`` for text from a mixture."""
    predictions = Predictions()
    rows = indices[_by_length(examples, indices)]
    for chunk, logits, labels in _forward(
        backbone, task, accelerator, served, examples, rows, batch_size, cache
    ):
        sums, counts = task.losses(logits, labels)
        predicted, expected = task.predict(logits, labels)
        predictions.loss_sum += float(sums.double().sum())
        predictions.count += float(counts.sum())
        predictions.predicted += predicted.tolist()
        predictions.expected += expected.tolist()
        if task.generates:
            if isinstance(served, Mixture):
                raise RecipeError(
                    [
                        "task.metrics: a mixture of models does not generate text; use perplexity or accuracy with it"
                    ]
                )
            with accelerator.autocast():
                generated, wanted = task.generate(backbone.model, examples, chunk, backbone.device)
            predictions.generated += generated
            predictions.references += wanted
    return score(task.metrics, predictions)


@torch.no_grad()
def example_losses(
    backbone: Backbone,
    task: Task,
    accelerator: Accelerator,
    row: Tensor,
    examples: Examples,
    indices: Indices,
    batch_size: int,
    cache: PrefixCache | None = None,
) -> Tensor:
    """Each example's summed loss (nats) with this adapter, ``(n,)`` float32 on the CPU, in the order of the indices."""
    order = _by_length(examples, indices)
    batches = _forward(
        backbone, task, accelerator, row, examples, indices[order], batch_size, cache
    )
    losses = torch.cat([task.losses(logits, labels)[0].cpu() for _, logits, labels in batches])
    return losses[torch.from_numpy(np.argsort(order))]


def _by_length(examples: Examples, indices: Indices) -> Indices:
    """An order in which batches need little padding; the longest come first, so that what does not fit into memory shows at once."""
    return np.argsort(-examples.lengths[indices], kind="stable")


def _forward(
    backbone: Backbone,
    task: Task,
    accelerator: Accelerator,
    served: Served,
    examples: Examples,
    indices: Indices,
    batch_size: int,
    cache: PrefixCache | None,
) -> Iterator[tuple[Indices, Tensor, Tensor]]:
    """Rows, logits and labels, batch after batch. A mixture's logits are its log-probabilities."""
    backbone.eval()
    rows = (served.rows if isinstance(served, Mixture) else served[None]).to(backbone.device)
    for start in range(0, len(indices), batch_size):
        chunk = indices[start : start + batch_size]
        labels, inputs = split(task.collate(examples, chunk), backbone.device)
        logits = []
        for row in rows:
            backbone.load_row(row)
            with (
                accelerator.autocast(),
                through(cache, chunk),
            ):  # anew for each row: autocast remembers weights
                logits.append(backbone.model(**inputs).logits)
        yield (
            chunk,
            _mixed(logits, served.weights) if isinstance(served, Mixture) else logits[0],
            labels,
        )


def _mixed(logits: list[Tensor], weights: Tensor) -> Tensor:
    """The mixture's log-probabilities, log Σ_k π_k softmax(logits_k)."""
    parts = [
        torch.log_softmax(each.float(), dim=-1) + weight.log().to(each.device)
        for each, weight in zip(logits, weights, strict=True)
    ]
    return torch.logsumexp(torch.stack(parts), dim=0)
