"""Base of tasks that classify texts, images or sounds: one label per example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.tasks.calibration import class_scores
from fedmerge_peft.tasks.imbalance import WeightedClasses
from fedmerge_peft.tasks.labels import encode_labels, infer_labels
from fedmerge_peft.tasks.predictions import Compared

if TYPE_CHECKING:
    from datasets import Dataset

PROBLEM_TYPE = "single_label_classification"
"""Name of the loss in transformers' configurations. It makes pipelines return the softmax, whatever
the model's ``config.json`` has."""


class Classification(WeightedClasses):
    """Task with one label per example. The loss is the cross-entropy without label smoothing.

    In training, the recipe's class weights and the focal factor multiply it.
    """

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    config_options: ClassVar[Mapping[str, Any]] = {"problem_type": PROBLEM_TYPE}

    @classmethod
    def output_names(cls, recipe: Any, table: Dataset) -> list[str]:
        return infer_labels(table, recipe.label, recipe.num_labels)

    @classmethod
    def targets(cls, recipe: Any, table: Dataset, labels: Sequence[str]) -> Tensor:
        return encode_labels(table, recipe.label, labels)

    def named(self, target: Tensor) -> str:
        return self.labels[int(target)]

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the cross-entropy ``-log softmax(logits)[label]`` of each example in float32.

        Args:
            logits: ``(batch, classes)``.
            labels: ``(batch,)``.

        Returns:
            Losses in nats, and the number of terms, which is 1; both float32 ``(batch,)``.
        """
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        return losses, torch.ones_like(losses)

    def term_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.losses(logits, labels)[0]

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return predicted and true classes, and the probabilities if a metric reads them."""
        scores = class_scores(self.metrics, logits, labels)
        return {"classes": (logits.argmax(dim=-1).tolist(), labels.tolist()), **scores}

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the most likely label of each example, and its probability."""
        scores, labels = torch.softmax(logits, dim=-1).max(dim=-1)
        return [
            {"label": self.labels[label], "score": score}
            for label, score in zip(labels.tolist(), scores.tolist(), strict=True)
        ]
