"""Output layer of a decoder at the labeled positions only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


class LabeledHead:
    """Frozen output layer of a decoder, applied to the hidden states before labeled tokens only.

    The layer is often the largest product of a pass, and its output the largest tensor: a number
    for each position and each token of the vocabulary.

    Args:
        layer: The output layer, which treats all positions alike.
    """

    def __init__(self, layer: nn.Linear) -> None:
        self._layer = layer

    @contextmanager
    def applied(self, labeled: Tensor) -> Iterator[None]:
        """Compute logits ``(1, n, vocabulary)`` at n labeled positions inside the context.

        Args:
            labeled: ``(batch, length)`` bool with n True.
        """

        def select(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            (states,) = args
            return (states[labeled][None],)

        handle = self._layer.register_forward_pre_hook(select)
        try:
            yield
        finally:
            handle.remove()
