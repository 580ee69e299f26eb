"""Trial of a model on packed batches (``models/packing.py``)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import BackboneError
from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.training.input_trial import tolerance
from fedmerge_peft.training.runtime import Runtime


def require_packing(runtime: Runtime, rows: Indices, recipe: Recipe) -> None:
    """Raise ``BackboneError`` unless packed examples give the same logits as padded ones.

    Args:
        runtime: Model, task and examples.
        rows: The rows of the table that clients hold.
        recipe: Recipe with ``training.packing``.

    Raises:
        BackboneError: The model or the task does not support packed batches.
    """
    if (reason := _obstacle(runtime, rows)) is not None:
        raise BackboneError(
            f"training.packing: {recipe.backbone.model} cannot process packed batches of this "
            f"task: {reason}; set training.packing to false"
        )


@torch.no_grad()
def _obstacle(runtime: Runtime, rows: Indices) -> str | None:
    """Return the reason why batches cannot be packed, or None.

    The trial packs four examples: the shortest one twice, the median one and the longest one. It
    packs them once as the batch of one adapter, and once as the batches of two adapters.
    """
    order = rows[np.argsort(runtime.examples.lengths[rows], kind="stable")]
    chunk = order[[0, -1, len(order) // 2, 0]]
    labels, inputs = runtime.to_device(runtime.collate(chunk))
    if set(inputs) != {"input_ids", "attention_mask"}:
        return (
            f"the model's inputs are {', '.join(sorted(inputs))}, but packing needs input_ids and "
            "attention_mask, and no others"
        )
    inside = inputs["attention_mask"].bool()
    runtime.backbone.eval()

    def logits(packed: bool, adapters: int = 1) -> Tensor:
        trial = replace(runtime, cache=None, packed=packed)
        return trial.logits(runtime.backbone.model, chunk, inputs, labels, adapters).float()

    expected = logits(False)
    by_token = expected.shape[:2] == inside.shape
    if not by_token and runtime.head is None:
        return "the model has one output for each example, and not for each token"
    for adapters in (1, 2):
        try:
            outputs = logits(True, adapters)
        except Exception as error:  # a model without position inputs may raise any error
            return f"the model fails ({type(error).__name__}: {error})"
        wanted = expected[inside] if by_token else expected
        difference = (outputs[inside] if by_token else outputs) - wanted
        if (
            not difference.norm()
            <= tolerance(runtime.backbone, runtime.accelerator) * wanted.norm()
        ):
            return "the logits differ from those of a padded batch; examples may affect each other"
    return None
