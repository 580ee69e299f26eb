"""What a task gives to training and evaluation, whatever its examples are."""

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


@dataclass(frozen=True)
class Examples:
    """Encoded examples: one tensor for each example and column, made once, before the first round."""

    columns: Mapping[str, Sequence[Tensor]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """How many numbers each example's first column has, ``(n,)``: its tokens, or its pixels."""
        return np.array(
            [tensor.numel() for tensor in next(iter(self.columns.values()))], dtype=np.int64
        )


@dataclass
class Predictions:
    """What a model said about some examples, as far as metrics need it."""

    loss_sum: float = 0.0
    count: float = 0.0
    """What the loss is a mean over: examples, or labelled tokens."""
    predicted: list[int] = field(default_factory=list)
    expected: list[int] = field(default_factory=list)
    generated: list[str] = field(default_factory=list)
    references: list[str] = field(default_factory=list)


class Task(ABC):
    """How rows become tensors, what the loss of an example is, how predictions are scored."""

    auto_model: ClassVar[str]
    """Name of the transformers class that loads the backbone, such as AutoModelForCausalLM."""
    peft_task_type: ClassVar[str | None]
    """PEFT's task type; SEQ_CLS adds the classification head to the adapter."""
    metrics: Sequence[str]
    """Names of the metrics; the first is the one that tables show."""
    labels: Sequence[str]
    """Names of the labels; empty where there are none."""
    processor: Any
    """The tokenizer or image processor that belongs to the backbone."""
    generates: bool = False
    """Whether some metric needs generated text."""

    @abstractmethod
    def encode(self, table: Dataset) -> Examples:
        """Turn rows into tensors. Raises ``DataError`` for rows that are not what the recipe says."""

    @abstractmethod
    def collate(self, examples: Examples, indices: NDArray[Any]) -> Batch:
        """Stack and pad these examples into the model's keyword arguments plus ``labels``; all on the CPU."""

    @abstractmethod
    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Each example's summed loss and what to divide by.

        Args:
            logits: ``(batch, classes)`` or ``(batch, length, vocabulary)``.
            labels: ``(batch,)`` or ``(batch, length)``, -100 where there is none.

        Returns:
            Two float32 tensors ``(batch,)``: the sum of the losses (nats), and how many terms it has.
        """

    def count_terms(self, labels: Tensor) -> int:
        """How many terms the loss of a batch with these labels has, before any forward pass."""
        return int((labels != -100).sum())

    @abstractmethod
    def predict(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted and expected class (or token) ids, both flat, where there is a label."""

    @torch.no_grad()
    def generate(
        self, model: Any, examples: Examples, indices: NDArray[Any], device: torch.device
    ) -> tuple[list[str], list[str]]:
        """Generated and wanted texts for these examples. Only tasks with ``generates`` have it."""
        raise TypeError(f"{type(self).__name__} does not generate text")
