"""Skip the positions that a classification head does not read, in the last encoder layer.

BERT's pooler reads the first token alone. After the attention of the last layer, all other
positions are then computed for nothing: two thirds of that layer's work, forward and backward.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fedmerge_peft.data.clients import Indices

if TYPE_CHECKING:
    from fedmerge_peft.training.runtime import Runtime

log = logging.getLogger(__name__)


def cut_to_first_token(runtime: Runtime, rows: Indices) -> FirstToken | None:
    """Return a cut of the model's last layer to the first token, if its head reads no other.

    A trial on the shortest and the longest example decides. The gradient of the losses must vanish
    at all other positions of the last layer, and the losses must agree with and without them.
    Results then agree up to rounding. Dropout masks are drawn for all positions, so they are the
    same.

    Args:
        runtime: Model, task and examples.
        rows: The rows of the table that clients hold.

    Returns:
        The cut, not applied; None if the model needs all positions.
    """
    layer = _last_layer(runtime.backbone.model)
    if layer is None:
        return None
    sizes = runtime.examples.lengths[rows]
    chunk = rows[[int(sizes.argmin()), int(sizes.argmax())]]
    runtime.backbone.eval()
    states: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: states.append(_tensor(call[-1])))
    with torch.enable_grad():
        losses = _losses(runtime, chunk)
    handle.remove()
    if len(states) != 1 or not states[0].requires_grad:
        return None
    (gradient,) = torch.autograd.grad(losses.sum(), states[0], allow_unused=True)
    if gradient is None or gradient.ndim != 3 or bool(gradient[:, 1:].any()):
        return None
    cut = FirstToken(layer)
    with torch.no_grad(), cut.applied():
        again = _losses(runtime, chunk)
    if not torch.allclose(again, losses.detach(), rtol=1e-3, atol=1e-3):
        return None
    log.info("the last layer computes the first token only: the head reads no other")
    return cut


class FirstToken:
    """Hooks that pass on the first token alone after the attention of one layer."""

    def __init__(self, layer: nn.Module) -> None:
        self._shape = torch.Size()
        """Shape of the states before the cut, ``(batch, length, width)``."""
        self._attention = layer.get_submodule("attention.output")
        parts = (self._attention, layer.get_submodule("output"))
        self._dropouts = [part.get_submodule("dropout") for part in parts]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Cut the passes inside the context."""
        handle: RemovableHandle = self._attention.register_forward_pre_hook(self._cut)
        for dropout in self._dropouts:
            dropout.forward = self._masked(dropout)
        try:
            yield
        finally:
            handle.remove()
            for dropout in self._dropouts:
                del dropout.forward

    def _cut(self, module: nn.Module, args: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        states, residual = args
        self._shape = states.shape
        return states[:, :1], residual[:, :1]

    def _masked(self, dropout: nn.Module):  # type: ignore[no-untyped-def]
        """Return a forward that draws the mask of all positions, and applies the first's."""

        def forward(states: Tensor) -> Tensor:
            keep = 1 - float(dropout.p)  # type: ignore[arg-type]
            if not dropout.training or keep == 1:
                return states
            mask = torch.empty(self._shape, dtype=states.dtype, device=states.device)
            return states * mask.bernoulli_(keep).div_(keep)[:, :1]

        return forward


def _last_layer(model: nn.Module) -> nn.Module | None:
    """Return the last layer that is built like BERT's; None if there is none."""
    layers = [
        layer
        for stack in model.modules()
        if isinstance(stack, nn.ModuleList)
        for layer in stack
        if _is_like_berts(layer)
    ]
    return layers[-1] if layers else None


def _is_like_berts(layer: nn.Module) -> bool:
    names = {name for name, _ in layer.named_modules()}
    parts = ("attention.output", "output")
    return all(f"{part}.{inner}" in names for part in parts for inner in ("dense", "dropout"))


def _losses(runtime: Runtime, chunk: Indices) -> Tensor:
    labels, inputs = runtime.to_device(runtime.collate(chunk))
    with runtime.accelerator.autocast():
        return runtime.task.losses(runtime.backbone.model(**inputs).logits, labels)[0]


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
