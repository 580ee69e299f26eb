"""Hooks that cut the last encoder layer to the position that the classification head reads.

BERT's pooler reads only the first token. After the attention of the last layer, the other positions
are therefore not needed. They account for two thirds of this layer's work, forward and backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class FirstToken:
    """Hooks that keep only the first token after the attention of one layer.

    Args:
        layer: Last layer of an encoder, built like BERT's.
    """

    def __init__(self, layer: nn.Module) -> None:
        self._shape = torch.Size()
        """Shape of the states before the cut, ``(batch, length, width)``."""
        self._attention = layer.get_submodule("attention.output")
        parts = (self._attention, layer.get_submodule("output"))
        self._dropouts = [part.get_submodule("dropout") for part in parts]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Cut the layer to the first token in passes inside the context."""
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
        """Return a forward function of dropout that draws masks for all positions.

        It applies the mask of the first position. The random numbers are therefore the same as
        without the cut.
        """

        def forward(states: Tensor) -> Tensor:
            keep = 1 - float(dropout.p)  # type: ignore[arg-type]
            if not dropout.training or keep == 1:
                return states
            mask = torch.empty(self._shape, dtype=states.dtype, device=states.device)
            return states * mask.bernoulli_(keep).div_(keep)[:, :1]

        return forward
