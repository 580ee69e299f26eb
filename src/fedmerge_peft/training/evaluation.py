"""Measuring one adapter on one client's examples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from fedmerge_peft.backbone import Backbone
from fedmerge_peft.tasks.base import Examples, Predictions, Task
from fedmerge_peft.tasks.metrics import score
from fedmerge_peft.training.reference import split

if TYPE_CHECKING:
    from accelerate import Accelerator


@torch.no_grad()
def evaluate(
    backbone: Backbone, task: Task, accelerator: Accelerator, examples: Examples, indices: NDArray[np.int64], batch_size: int
) -> dict[str, float]:
    """Loss (nats) and metrics of the adapter in the slot on these rows: ``{"loss": ..., "accuracy": ...}``."""
    backbone.eval()
    predictions = Predictions()
    for start in range(0, len(indices), batch_size):
        chunk = indices[start : start + batch_size]
        labels, inputs = split(task.collate(examples, chunk), backbone.device)
        with accelerator.autocast():
            logits = backbone.model(**inputs).logits
        sums, counts = task.losses(logits, labels)
        predicted, expected = task.predict(logits, labels)
        predictions.loss_sum += float(sums.double().sum())
        predictions.count += float(counts.sum())
        predictions.predicted += predicted.tolist()
        predictions.expected += expected.tolist()
        if task.generates:
            with accelerator.autocast():
                generated, wanted = task.generate(backbone.model, examples, chunk, backbone.device)
            predictions.generated += generated
            predictions.wanted += wanted
    return score(task.metrics, predictions)
