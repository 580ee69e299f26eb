"""Base of text and image classification: one label per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.tasks.base import Compared, Examples, Task


class Classification(Task):
    """Task with one label per example. The loss is the unweighted cross-entropy, not smoothed."""

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy ``-log softmax(logits)[label]`` of each example in float32.

        Args:
            logits: ``(batch, classes)``.
            labels: ``(batch,)``.

        Returns:
            Losses in nats and ones, both float32 ``(batch,)``.
        """
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        return losses, torch.ones_like(losses)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return the most likely class and the label of each example."""
        return {"classes": (logits.argmax(dim=-1).tolist(), labels.tolist())}

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the most likely label of each example, and its probability."""
        scores, labels = torch.softmax(logits, dim=-1).max(dim=-1)
        return [
            {"label": self.labels[label], "score": score}
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
