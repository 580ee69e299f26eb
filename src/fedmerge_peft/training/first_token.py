"""Trial that decides whether the last layer may be cut to one token (``models/first_token.py``)."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.models.first_token import FirstToken
from fedmerge_peft.training.runtime import Runtime

log = logging.getLogger(__name__)


def cut_to_first_token(runtime: Runtime, rows: Indices) -> FirstToken | None:
    """Return a cut of the model's last layer to the first token, if its head reads no other token.

    A trial on the shortest and the longest example decides. The gradient of the losses must be zero
    at all other positions of the last layer's output, and the losses must agree with and without
    these positions. The losses of an example of odd length must agree, too, if there is one.
    Longformer pads such an example to a multiple of its window, and removes as many positions from
    the end of the last layer's output, which does not work with the cut.

    With the cut, results are equal up to rounding. Dropout masks are drawn for all positions, so
    the cut does not change them.

    Args:
        runtime: Model, task and examples.
        rows: Rows of the table that belong to clients; the trial takes examples from these.

    Returns:
        The cut, not applied. None if the trial fails, if no layer is built like BERT's, if batches
        are not padded on the right, or with gradient checkpointing.
    """
    layer = _last_layer(runtime.backbone.model)
    if layer is None or runtime.task.padding != "right":
        return None
    if getattr(layer, "gradient_checkpointing", False):  # recomputed passes would lack the cut
        return None
    sizes = runtime.examples.lengths[rows]
    chunk = rows[[int(sizes.argmin()), int(sizes.argmax())]]
    runtime.backbone.eval()
    states: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *call: states.append(_tensor(call[-1])))
    try:
        with torch.enable_grad():
            losses = _losses(runtime, chunk)
            odd = rows[sizes % 2 == 1][:1]
            trials = [(chunk, losses.detach())]
            if len(odd):
                trials.append((odd, _losses(runtime, odd).detach()))
    except Exception as error:  # training raises it again, and names the client
        log.info("the last layer computes all tokens: %s: %s", type(error).__name__, error)
        return None
    finally:
        handle.remove()
    if len(states) != len(trials) or not states[0].requires_grad:
        return None
    (gradient,) = torch.autograd.grad(losses.sum(), states[0], allow_unused=True)
    if gradient is None or gradient.ndim != 3 or bool(gradient[:, 1:].any()):
        return None
    cut = FirstToken(layer)
    try:
        with torch.no_grad(), cut.applied():
            agree = [
                torch.allclose(_losses(runtime, tried), expected, rtol=1e-3, atol=1e-3)
                for tried, expected in trials
            ]
    except Exception as error:  # a model that needs the other positions elsewhere
        log.info("the last layer computes all tokens: %s: %s", type(error).__name__, error)
        return None
    if not all(agree):
        return None
    log.info("the last layer computes the first token only: the head reads no other")
    return cut


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
        return runtime.task.losses(runtime.task.forward(runtime.backbone.model, inputs), labels)[0]


def _tensor(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output[0] if isinstance(output, tuple) else output
