"""Output layer of a decoder at the labeled positions only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 2**24
"""Largest number of logits in a chunk of ``LabeledHead.losses``. They take 64 MiB in float32, for
example 341 positions with a vocabulary of 49,152 tokens."""


class LabeledHead:
    """Frozen output layer of a decoder, applied to the hidden states before labeled tokens only.

    The layer is often the largest matrix product of a pass. Its output has one number for each
    position and each token of the vocabulary, and is often the largest tensor.

    Args:
        layer: The output layer, which processes each position separately.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer
        self.unchanged = False
        """True if the model returns the layer's output unchanged, and the task's losses need only
        cross-entropies, so that ``losses`` may replace the logits."""

    @contextmanager
    def applied(self, labeled: Tensor) -> Iterator[None]:
        """Compute logits ``(1, n, vocabulary)`` at n labeled positions inside the context.

        Args:
            labeled: ``(batch, length)`` bool with n True.
        """
        with self._reading(lambda states: states[labeled.to(states.device)][None]):
            yield

    @contextmanager
    def set_aside(self, labeled: Tensor) -> Iterator[list[Tensor]]:
        """Keep the layer's input ``(n, width)`` inside the context, instead of computing logits.

        Args:
            labeled: As in ``applied``.

        Yields:
            A list to which each pass of the model appends the layer's input.
        """
        kept: list[Tensor] = []

        def keep(states: Tensor) -> Tensor:
            kept.append(states[labeled.to(states.device)].to(labeled.device))
            return states[:, :0]

        with self._reading(keep):
            yield kept

    @contextmanager
    def _reading(self, select: Callable[[Tensor], Tensor]) -> Iterator[None]:
        handle = self._layer.register_forward_pre_hook(lambda _, args: (select(*args),))
        try:
            yield
        finally:
            handle.remove()

    def in_chunks(self, positions: int) -> bool:
        """Return True if training on this many positions should use ``losses``, not logits."""
        return self.unchanged and positions > self._chunk

    @property
    def _chunk(self) -> int:
        return max(1, CHUNK // self._layer.out_features)

    def losses(self, states: Tensor, targets: Tensor) -> Tensor:
        """Compute ``-log softmax(logits)[target]`` at n positions, in chunks of ``CHUNK`` logits.

        A loss depends only on the state of its own position. The forward pass can therefore compute
        its gradient, too, before it discards the logits of a chunk. The backward pass multiplies
        this gradient by the upstream gradient, which contains, for example, the weights of
        examples. Both passes together need two matrix products, as without chunks.
        ``torch.utils.checkpoint`` and ``functional.linear_cross_entropy(reduction="none")`` would
        compute the logits twice; other reductions of ``linear_cross_entropy`` cannot weight
        positions. Because the layer itself is called, biases, quantized weights and autocast have
        their usual effect.

        Args:
            states: ``(n, width)``, from ``set_aside``.
            targets: ``(n,)`` ids of tokens.

        Returns:
            ``(n,)`` in nats.
        """
        apply: Callable[..., Tensor] = _TokenLosses.apply
        return apply(states, targets, self._layer, self._chunk)


def frozen_output_layer(model: Any) -> nn.Linear | None:
    """Return a PEFT model's output layer; None unless it is a linear layer without training."""
    layer = getattr(model.get_base_model(), "get_output_embeddings", lambda: None)()
    if not isinstance(layer, nn.Linear) or any(p.requires_grad for p in layer.parameters()):
        return None
    return layer


class _TokenLosses(torch.autograd.Function):
    """Losses in chunks. ``forward`` also computes their gradients for an upstream gradient of 1."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, targets: Tensor, layer: nn.Linear, chunk: int) -> Tensor:
        losses: list[Tensor] = []
        gradients: list[Tensor] = []
        for part, ids in zip(torch.split(states, chunk), torch.split(targets, chunk), strict=True):
            leaf = part.detach().requires_grad_(ctx.needs_input_grad[0])
            with torch.enable_grad():
                logits = layer(leaf).float().to(ids.device)
                own = functional.cross_entropy(logits, ids, reduction="none")
            if leaf.requires_grad:
                gradients += torch.autograd.grad(own, leaf, torch.ones_like(own))
            losses.append(own.detach())
        ctx.save_for_backward(*([torch.cat(gradients)] if gradients else []))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (upstream[:, None] * gradient).to(gradient), None, None, None
