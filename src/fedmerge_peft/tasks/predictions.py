"""Outputs of a model, and the references with which metrics compare them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Compared = tuple[Sequence[Any], Sequence[Any]]
"""Outputs and references: two sequences with one item per example or token."""


@dataclass
class Predictions:
    """Model outputs and references that metrics need."""

    loss_sum: float = 0.0
    """Sum of the losses, in nats; of squared errors for regression."""
    count: float = 0.0
    """Number of terms in ``loss_sum``, such as examples or labeled tokens."""
    outputs: dict[str, tuple[list[Any], list[Any]]] = field(default_factory=dict)
    """Outputs and references by kind, such as ``classes``. A metric is registered with the kinds
    that it compares (``of``)."""

    def add(self, compared: Mapping[str, Compared]) -> None:
        """Append the outputs and references of a batch, by kind."""
        for kind, (predicted, expected) in compared.items():
            known = self.outputs.setdefault(kind, ([], []))
            known[0].extend(predicted)
            known[1].extend(expected)
