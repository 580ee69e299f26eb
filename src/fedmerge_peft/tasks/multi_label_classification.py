"""Classification of texts and pairs of texts with any number of labels each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.data.column_types import whole_numbers
from fedmerge_peft.data.columns import join_values, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Compared, Examples
from fedmerge_peft.tasks.encoder import loading_code
from fedmerge_peft.tasks.labels import reject_nulls
from fedmerge_peft.tasks.lists import encode_lists, infer_list_labels, relabel_lists
from fedmerge_peft.tasks.texts import TextTask

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.label_tasks import MultiLabelClassificationRecipe as Section

_TYPE = "multi_label_classification"


class MultiLabelClassificationTask(TextTask):
    """Labels that are decided one by one, p = sigmoid(z); ``EncoderTask`` has the arguments."""

    loading_code: ClassVar[str] = loading_code("AutoModelForSequenceClassification", _TYPE)
    config_options: ClassVar[Mapping[str, Any]] = {"problem_type": _TYPE}

    @classmethod
    def output_names(cls, recipe: Section, table: Dataset) -> list[str]:
        if isinstance(recipe.labels, list):
            return list(recipe.labels)
        return infer_list_labels(table, recipe.labels, "task.labels")

    @classmethod
    def labels_in(cls, recipe: Section, table: Dataset) -> list[str]:
        return cls.output_names(recipe, table)

    @classmethod
    def relabel(cls, recipe: Section, table: Dataset, labels: Sequence[str]) -> Dataset:
        if isinstance(recipe.labels, list):
            return table
        return relabel_lists(table, recipe.labels, "task.labels", labels)

    @classmethod
    def targets(cls, recipe: Section, table: Dataset, labels: Sequence[str]) -> Tensor:
        targets = torch.zeros(len(table), len(labels))
        if isinstance(recipe.labels, list):
            for place, name in enumerate(recipe.labels):
                targets[:, place] = torch.from_numpy(_flags(table, name)).to(targets)
            return targets
        for row, ids in enumerate(encode_lists(table, recipe.labels, "task.labels", labels)):
            if len(set(ids)) < len(ids):
                raise DataError(
                    f"row {row} (of the rows in use): column {recipe.labels!r} has a label twice: "
                    f"{join_values(labels[label] for label in ids)}"
                )
            targets[row, ids] = 1
        return targets

    @classmethod
    def blanks(cls, recipe: Section, labels: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        from datasets import ClassLabel, List, Value

        if isinstance(recipe.labels, list):
            return {name: (Value("int64"), 0) for name in recipe.labels}
        return {recipe.labels: (List(ClassLabel(names=list(labels))), [])}

    def named(self, target: Tensor) -> str:
        return ", ".join(self.labels[place] for place in torch.nonzero(target).flatten().tolist())

    def count_terms(self, labels: Tensor) -> int:
        return labels.numel()

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the binary cross-entropy of the labels of each example.

        Args:
            logits: z, ``(batch, labels)``.
            labels: 0 or 1, ``(batch, labels)``.

        Returns:
            Sum in nats and number of labels, both float32 ``(batch,)``.
        """
        losses = functional.binary_cross_entropy_with_logits(
            logits.float(), labels.to(logits.device).float(), reduction="none"
        ).sum(dim=1)
        return losses, torch.full_like(losses, logits.shape[1])

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return the labels above the threshold and the true ones, and the probabilities."""
        expected = labels.long().tolist()
        return {
            "label_sets": (self._above(logits).long().tolist(), expected),
            "label_scores": (logits.float().sigmoid().tolist(), expected),
        }

    def mix(self, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the logit of Σ_k π_k sigmoid(z_k), label by label."""
        z = torch.stack([component.float() for component in logits])
        log_weights = weights.log().to(z.device).view(-1, 1, 1)
        yes, no = (
            torch.logsumexp(functional.logsigmoid(sign * z) + log_weights, dim=0)
            for sign in (1, -1)
        )
        return yes - no

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the labels above the threshold, and the probability of each of them."""
        answers = []
        for scores, above in zip(logits.sigmoid().tolist(), self._above(logits), strict=True):
            places = torch.nonzero(above).flatten().tolist()
            answers.append(
                {
                    "labels": [self.labels[place] for place in places],
                    "scores": [scores[place] for place in places],
                }
            )
        return answers

    def _above(self, logits: Tensor) -> Tensor:
        """Return a mask of the labels with p ≥ threshold, in terms of z."""
        threshold = self.recipe.threshold
        return logits >= math.log(threshold) - math.log1p(-threshold)


def _flags(table: Dataset, column: str) -> NDArray[np.int64]:
    """Return a column of 0 and 1 or booleans, ``(rows,)``."""
    (values,) = whole_numbers([read_column(table, column, "task.labels")])
    reject_nulls(values, column)
    kind = values.type
    if len(values) and not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(f"task.labels: column {column!r} has the type {kind}, expected 0 and 1")
    flags: NDArray[np.int64] = values.to_numpy().astype(np.int64)
    if (wrong := (flags != 0) & (flags != 1)).any():
        row = int(wrong.argmax())
        raise DataError(
            f"row {row} (of the rows in use): column {column!r} has {flags[row]}, expected 0 or 1"
        )
    return flags
