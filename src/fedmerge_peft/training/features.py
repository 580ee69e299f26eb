"""Features (the input of the model's last layer): their alignment and statistics by class."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import RecipeError
from fedmerge_peft.models.backbone import Backbone
from fedmerge_peft.training.plan import Alignment
from fedmerge_peft.training.runtime import Runtime


@contextmanager
def captured_features(backbone: Backbone) -> Iterator[list[Tensor]]:
    """Append the features of each forward pass inside the context to a list.

    A pass over n examples appends one tensor ``(n, d)`` on the backbone's device, in the order of
    the examples.

    Raises:
        RecipeError: The adapter does not contain the model's last layer, or this layer does not
            read one vector per example.
    """
    vectors: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        (features,) = inputs
        if features.ndim != 2:
            raise RecipeError(
                "strategy, baselines: the class centroids of fedpac need one feature vector per "
                "example, but the head of this model reads a batch as a tensor of "
                f"{features.ndim} dimensions, expected 2; use an encoder for classification in "
                "backbone.model, or another method instead of fedpac"
            )
        vectors.append(features.to(backbone.device))

    handle = last_layer(backbone).register_forward_pre_hook(keep)
    try:
        yield vectors
    finally:
        handle.remove()


def last_layer(backbone: Backbone) -> nn.Module:
    """Return the layer of the adapter that computes the logits.

    Raises ``RecipeError`` if the adapter has no such layer.
    """
    entry = backbone.layout.classifier
    if entry is None:
        raise RecipeError(
            "strategy, baselines: class centroids need a head, but this adapter has none; name one "
            "in lora.modules_to_save, or use another strategy"
        )
    weight = backbone.trainable[backbone.layout.entries.index(entry)]
    modules: Iterator[nn.Module] = backbone.model.modules()
    return next(
        module
        for module in modules
        if any(parameter is weight for parameter in module.parameters(recurse=False))
    )


def penalties(alignment: Alignment, features: Tensor, labels: Tensor) -> Tensor:
    """Compute λ/d ‖f − c_y‖² of each example, ``(n,)``; 0 if its class has no centroid.

    Args:
        alignment: c and λ.
        features: f, ``(n, d)``.
        labels: y, ``(n,)``.
    """
    centroids = alignment.centroids.to(features.device)[labels]
    known = ~centroids.isnan().any(dim=1)
    distances = (features.float() - centroids.nan_to_num()).square().mean(dim=1)
    return alignment.strength * distances * known


@torch.no_grad()
def class_statistics(runtime: Runtime, row: Tensor, indices: Indices, batch_size: int) -> Tensor:
    """Compute the statistics of the features f of each class under one adapter.

    Args:
        runtime: Model, task and examples.
        row: Adapter, ``(P,)``.
        indices: Rows of the table.
        batch_size: Largest number of examples in a pass.

    Returns:
        ``(classes, d + 2)`` float32 on the CPU: number of examples, Σ ‖f‖², and Σ f.

    Raises:
        RecipeError: As in ``captured_features`` and ``PrefixCache.prepare``.
    """
    backbone = runtime.backbone
    backbone.eval()
    backbone.load_row(row.to(backbone.device))
    labels, features = [], []
    with captured_features(backbone) as captured:
        for chunk in runtime.batches(indices, batch_size):
            targets, inputs = runtime.to_device(runtime.collate(chunk))
            with runtime.forward_pass(chunk):
                backbone.model(**inputs)
            labels.append(targets.cpu())
            features.append(captured.pop().double().cpu())
    return summed_by_class(torch.cat(features), torch.cat(labels), len(runtime.task.labels))


def summed_by_class(features: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Compute the number of examples, Σ ‖f‖² and Σ f of each class.

    Args:
        features: f, ``(n, d)`` float64.
        labels: ``(n,)`` int64.
        classes: Number of classes.

    Returns:
        ``(classes, d + 2)`` float32.
    """
    squares = features.square().sum(dim=1, keepdim=True)
    columns = torch.cat([torch.ones_like(squares), squares, features], dim=1)
    sums = torch.zeros(classes, columns.shape[1], dtype=columns.dtype)
    return sums.index_add(0, labels, columns).float()
