"""Trial that decides if a decoder's logits may be computed at labeled positions only.

``models/labeled_head.py`` computes these logits.
"""

from __future__ import annotations

import logging

import numpy as np
import torch

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.labeled_head import LabeledHead, frozen_output_layer
from fedmerge_peft.training.runtime import Runtime

log = logging.getLogger(__name__)


def labeled_head(runtime: Runtime, rows: Indices) -> LabeledHead | None:
    """Return a decoder's output layer for labeled positions only; None if it cannot be used.

    It cannot be used if the model has no frozen output layer, or if the task needs the logits of
    all positions (``Task.token_targets``). Otherwise, a trial on one or two short examples decides:
    the losses must agree with the losses of a plain pass. A second trial sets
    ``LabeledHead.unchanged`` to True if the model returns the layer's output bit for bit, neither
    scaled nor capped, and the task's losses need only cross-entropies.

    Args:
        runtime: Model, task and examples.
        rows: Rows of the table that belong to clients; the trial takes one or two of them.
    """
    task, model = runtime.task, runtime.backbone.model
    layer = frozen_output_layer(model)
    if layer is None:
        return None
    _, first = np.unique(runtime.examples.lengths[rows], return_index=True)
    chunk = runtime.parts(rows[first[:2]])[0]
    labels, inputs = runtime.to_device(runtime.collate(chunk))
    targets = task.token_targets(labels)
    if targets is None:
        return None
    labeled = targets != -100
    head = LabeledHead(layer)
    runtime.backbone.eval()
    try:
        with torch.no_grad(), runtime.accelerator.autocast():
            expected = task.losses(task.forward(model, inputs), labels)[0]
            with head.applied(labeled):
                logits = task.forward(model, inputs)
            labeled_losses = task.losses(logits[0], labels)[0]
    except Exception as error:  # training raises it again, and names the client
        log.info("logits are computed at all positions: %s: %s", type(error).__name__, error)
        return None
    if not torch.allclose(labeled_losses, expected, rtol=1e-3, atol=1e-3):
        log.info(
            "logits are computed at all positions: at labeled positions alone, the loss differs"
        )
        return None
    try:
        with torch.no_grad(), runtime.accelerator.autocast():
            with head.set_aside(labeled) as kept:
                task.forward(model, inputs)
            (states,) = kept
            own = task.losses(head.losses(states, targets[labeled]), labels)[0]
            same = torch.equal(layer(states[None]).to(logits), logits)
            head.unchanged = same and torch.allclose(own, labeled_losses, rtol=1e-3, atol=1e-3)
    except Exception as error:
        log.info("losses are not computed in chunks: %s: %s", type(error).__name__, error)
    return head
