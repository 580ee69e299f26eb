"""Order of the labels in a pretrained head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.models.checkpoint import in_head

logger = logging.getLogger(__name__)


def label_names(config: Any) -> list[str]:
    """Return the names in ``id2label`` in the order of their ids; [] if there are none."""
    named = getattr(config, "id2label", None) or {}
    return [str(named[label]) for label in sorted(named)]


def order_head(model: Any, held: Sequence[str], labels: Sequence[str]) -> None:
    """Reorder the outputs of a pretrained head to match the task's labels.

    Transformers matches weights by position. If a checkpoint has outputs for negative and positive,
    in this order, and the task's first label is positive, the outputs would be swapped. The
    comparison of names ignores case. A head with other names keeps its order.

    Args:
        model: Model of transformers with a head for ``labels``.
        held: Names of the checkpoint's labels, in order.
        labels: Names of the task's labels, in order.
    """
    places = {name.casefold(): place for place, name in enumerate(held)}
    wanted = [name.casefold() for name in labels]
    if places.keys() != set(wanted) or not len(held) == len(labels) == len(places):
        return
    order = torch.tensor([places[name] for name in wanted])
    if torch.equal(order, torch.arange(len(order))):
        return
    with torch.no_grad():
        for tensor in _output_tensors(model, len(order)):
            tensor.copy_(tensor[order.to(tensor.device)])
    logger.info(
        "the outputs of the pretrained head were put into the order of the data's labels: %s",
        join_values(labels),
    )


def _output_tensors(model: Any, count: int) -> list[Tensor]:
    """Return weights and biases of each head's last module, if it has one output per label."""
    last: dict[str, Any] = {}
    for path, module in model.named_modules():
        if getattr(module, "weight", None) is not None and in_head(model, f"{path}.weight"):
            last[path.partition(".")[0]] = module
    return [
        tensor
        for name, module in last.items()
        if name != "pooler"
        for tensor in (module.weight, getattr(module, "bias", None))
        if tensor is not None and tensor.shape[0] == count
    ]
