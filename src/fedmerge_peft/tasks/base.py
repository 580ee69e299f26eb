"""Base class of tasks: encoding, loss and predictions of examples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

Batch = dict[str, Tensor]
"""Keyword arguments of the model, and ``labels``."""


@dataclass(frozen=True)
class Examples:
    """Encoded examples, created once before the first round: one tensor per example and column."""

    columns: Mapping[str, Sequence[Tensor]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """Number of elements in the first column of each example, ``(n,)``: tokens or pixels."""
        return np.array(
            [tensor.numel() for tensor in next(iter(self.columns.values()))], dtype=np.int64
        )


@dataclass
class Predictions:
    """Model outputs and references that metrics need."""

    loss_sum: float = 0.0
    """Sum of the losses, in nats."""
    count: float = 0.0
    """Number of terms in ``loss_sum``: examples, or labeled tokens."""
    predicted: list[int] = field(default_factory=list)
    """Predicted class or token ids."""
    expected: list[int] = field(default_factory=list)
    """True class or token ids."""
    generated: list[str] = field(default_factory=list)
    """Generated texts."""
    references: list[str] = field(default_factory=list)
    """Reference texts."""


class Task(ABC):
    """Encoding of rows as tensors, loss of an example, and predictions for metrics."""

    auto_model: ClassVar[str]
    """Transformers class that loads the backbone, such as AutoModelForCausalLM."""
    peft_task_type: ClassVar[str | None]
    """PEFT task type. SEQ_CLS adds the classification head to the adapter."""
    metrics: Sequence[str]
    """Names of the metrics. Tables show the first one."""
    labels: Sequence[str]
    """Names of the labels. Empty for tasks without labels."""
    processor: Any
    """Tokenizer or image processor of the backbone."""
    generates: bool = False
    """True if a metric needs generated text."""

    @abstractmethod
    def encode(self, table: Dataset) -> Examples:
        """Convert rows to tensors.

        Raises:
            DataError: The rows do not match the recipe.
        """

    @abstractmethod
    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack and pad examples into the model's keyword arguments and ``labels``, on the CPU."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the summed loss and the number of loss terms of each example.

        Args:
            logits: ``(batch, classes)`` or ``(batch, length, vocabulary)``.
            labels: ``(batch,)`` or ``(batch, length)``; -100 marks positions without a label.

        Returns:
            Two float32 tensors ``(batch,)``: sum of the losses in nats, and number of terms.
        """

    def count_terms(self, labels: Tensor) -> int:
        """Count the loss terms of a batch with these labels, without a forward pass."""
        return int((labels != -100).sum())

    @abstractmethod
    def predict(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return predicted and true class or token ids at labeled positions, both flat."""

    @torch.no_grad()
    def generate(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> tuple[list[str], list[str]]:
        """Return generated and reference texts of examples. Tasks with ``generates`` override it.

        Raises:
            TypeError: The task does not generate text.
        """
        raise TypeError(f"{type(self).__name__} does not generate text")
