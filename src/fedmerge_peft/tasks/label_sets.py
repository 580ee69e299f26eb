"""Base of tasks whose examples have any number of labels each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.data.column_types import whole_numbers
from fedmerge_peft.data.columns import read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Examples
from fedmerge_peft.tasks.imbalance import WeightedClasses
from fedmerge_peft.tasks.labels import is_text, reject_nulls
from fedmerge_peft.tasks.lists import (
    encode_lists,
    infer_list_labels,
    reject_indicators,
    relabel_lists,
)
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.row_names import row_name

if TYPE_CHECKING:
    from datasets import Dataset


PROBLEM_TYPE = "multi_label_classification"
"""Name of the loss in transformers' configurations. It makes pipelines return sigmoids."""


class LabelSets(WeightedClasses):
    """Base of tasks that predict each label independently, with p = sigmoid(z)."""

    names_classes: ClassVar[bool] = False
    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    config_options: ClassVar[Mapping[str, Any]] = {"problem_type": PROBLEM_TYPE}

    @classmethod
    def output_names(cls, recipe: Any, table: Dataset) -> list[str]:
        if isinstance(recipe.labels, list):
            return list(recipe.labels)
        reject_indicators(table, recipe.labels, "task.labels")
        return infer_list_labels(table, recipe.labels, "task.labels")

    @classmethod
    def labels_in(cls, recipe: Any, table: Dataset) -> list[str]:
        return cls.output_names(recipe, table)

    @classmethod
    def relabel(cls, recipe: Any, table: Dataset, labels: Sequence[str]) -> Dataset:
        if isinstance(recipe.labels, list):
            return table
        reject_indicators(table, recipe.labels, "task.labels")
        return relabel_lists(table, recipe.labels, "task.labels", labels)

    @classmethod
    def targets(cls, recipe: Any, table: Dataset, labels: Sequence[str]) -> Tensor:
        targets = torch.zeros(len(table), len(labels))
        if isinstance(recipe.labels, list):
            for place, name in enumerate(recipe.labels):
                targets[:, place] = torch.from_numpy(_flags(table, name)).to(targets)
            return targets
        for row, ids in enumerate(encode_lists(table, recipe.labels, "task.labels", labels)):
            if len(set(ids)) < len(ids):
                raise DataError(
                    f"{row_name(row)}: column {recipe.labels!r} has a label twice: "
                    f"{next(labels[label] for label in ids if ids.count(label) > 1)}; write it once"
                )
            targets[row, ids] = 1
        return targets

    @classmethod
    def blanks(cls, recipe: Any, labels: Sequence[str]) -> dict[str, tuple[Any, Any]]:
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
        losses = self.term_losses(logits, labels).sum(dim=1)
        return losses, torch.full_like(losses, logits.shape[1])

    def term_losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        return functional.binary_cross_entropy_with_logits(
            logits.float(), labels.to(logits.device).float(), reduction="none"
        )

    def term_weights(self, labels: Tensor, class_weights: Tensor) -> Tensor:
        """Return the class weight of each label that an example has, and 1 for absent labels."""
        return torch.where(labels.to(class_weights.device) > 0, class_weights, 1.0)

    def loss_divisor(self, labels: Tensor, class_weights: Tensor | None) -> float:
        return self.count_terms(labels)  # as BCEWithLogitsLoss with pos_weight

    def balanced_weights(self, labels: Sequence[Tensor]) -> Tensor:
        """Compute w_c = (n - n_c) / n_c, so that both values of a label have equal sums of weights.

        n is the number of examples and n_c the number with label c. If n_c is 0 or n, w_c is 1.
        """
        n, counts = len(labels), torch.stack(list(labels)).sum(dim=0)
        known = (counts > 0) & (counts < n)
        return torch.where(known, (n - counts) / counts.clamp_min(1), 1.0)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return predictions as 0 and 1, and as probabilities, each with the true labels."""
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
        """Return the labels with p ≥ threshold and their probabilities, for each example."""
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
        """Return a mask of the labels with p ≥ threshold, computed from z."""
        threshold = self.recipe.threshold
        return logits >= math.log(threshold) - math.log1p(-threshold)


def _flags(table: Dataset, column: str) -> NDArray[np.int64]:
    """Read a column of 0 and 1, or of booleans, as int64 ``(rows,)``.

    They may be written as text. Raises ``DataError`` for nulls and other values.
    """
    (values,) = whole_numbers([read_column(table, column, "task.labels")])
    reject_nulls(values, column)
    if is_text(values.type):
        with suppress(pa.ArrowInvalid):
            values = values.cast(pa.bool_())  # texts True and 1, from pandas and spreadsheets
    kind = values.type
    if len(values) and not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise DataError(
            f"task.labels: column {column!r} has the type {kind}, expected 0 and 1; convert it, or "
            "name another column"
        )
    flags: NDArray[np.int64] = values.to_numpy().astype(np.int64)
    if (wrong := (flags != 0) & (flags != 1)).any():
        row = int(wrong.argmax())
        raise DataError(f"{row_name(row)}: column {column!r} has {flags[row]}, expected 0 or 1")
    return flags
