"""Base of tasks that predict a number for each example."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.data.columns import is_number, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Examples, Task
from fedmerge_peft.tasks.labels import is_text, reject_nulls
from fedmerge_peft.tasks.predictions import Compared
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.label_tasks import RegressionRecipe

logger = logging.getLogger(__name__)

_FAR = 20.0
"""Largest absolute target without a warning. The outputs of a new head start near 0."""

_LARGEST = 1e12
"""Largest accepted absolute target. The sum of 1,000,000 such squared errors fits in float32."""

PROBLEM_TYPE = "regression"
"""Name of the loss in transformers' configurations. It makes pipelines return the raw output."""


class Regression(Task):
    """Regression with one output z; the loss is the squared error (z − y)².

    Targets y are not standardized: an exported model predicts them as they are, and clients need
    not agree on a mean and a deviation.
    """

    heads: ClassVar[tuple[str, ...]] = ("classifier", "score")
    config_options: ClassVar[Mapping[str, Any]] = {"problem_type": PROBLEM_TYPE}

    @classmethod
    def output_names(cls, recipe: RegressionRecipe, table: Dataset) -> list[str]:
        return [recipe.target]

    @classmethod
    def targets(cls, recipe: RegressionRecipe, table: Dataset, labels: Sequence[str]) -> Tensor:
        """Return the targets of all rows, ``(rows,)``.

        The targets in a ``ClassLabel`` column are its names, read as numbers. Raises ``DataError``
        if the column does not exist, and for missing, non-numeric, non-finite or too large values.
        """
        values = read_column(table, recipe.target, "task.target")
        reject_nulls(values, recipe.target)
        if names := getattr(table.features[recipe.target], "names", None):
            texts = [names[place] if place >= 0 else "" for place in values.to_pylist()]
            values = pa.chunked_array([pa.array(texts, pa.string())])
        if pa.types.is_decimal(values.type):
            values = values.cast(pa.float64())
        if is_text(values.type):
            values = _numbers(values, recipe.target)
        kind = values.type
        if len(values) and not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(
                f"task.target: column {recipe.target!r} has the type {kind}, such as "
                f"{values[0].as_py()!r} in row 0, expected numbers; choose another column"
            )
        numbers = values.to_numpy().astype(np.float64)
        if not np.isfinite(numbers).all():
            row = int((~np.isfinite(numbers)).argmax())
            raise DataError(
                f"{row_name(row)}: column {recipe.target!r} has {numbers[row]}, "
                "expected a finite number; correct the value, or remove the row"
            )
        largest = float(np.abs(numbers).max(initial=0.0))
        if largest > _LARGEST:
            raise DataError(
                f"task.target: column {recipe.target!r} has magnitudes up to {largest:.3g}, but at "
                f"most {_LARGEST:g} is accepted, because squared errors would be too large for a "
                "loss; divide the column by a constant"
            )
        if largest > _FAR:
            logger.warning(
                "task.target: column %r has magnitudes up to %.3g, but the model's outputs start "
                "near 0; divide the column by a constant to train faster",
                recipe.target,
                largest,
            )
        return torch.tensor(numbers.tolist(), dtype=torch.get_default_dtype())

    @classmethod
    def blanks(cls, recipe: RegressionRecipe, labels: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        from datasets import Value

        return {recipe.target: (Value("float64"), 0.0)}

    def count_terms(self, labels: Tensor) -> int:
        return len(labels)

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Compute (z − y)² of each example.

        Args:
            logits: z, ``(batch, 1)``.
            labels: y, ``(batch,)``.

        Returns:
            Losses and ones, both float32 ``(batch,)``.
        """
        losses = (logits[:, 0].float() - labels).square()
        return losses, torch.ones_like(losses)

    def predict(self, logits: Tensor, labels: Tensor) -> Mapping[str, Compared]:
        """Return z and y of each example."""
        return {"values": (logits[:, 0].float().tolist(), labels.tolist())}

    def mix(self, logits: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the mean prediction, Σ_k π_k z_k."""
        pairs = zip(logits, weights.tolist(), strict=True)
        return torch.stack([component.float() * weight for component, weight in pairs]).sum(dim=0)

    def answers(
        self, logits: Tensor, examples: Examples, indices: NDArray[Any]
    ) -> Sequence[dict[str, Any]]:
        """Return the predicted number of each example in the form of a transformers pipeline."""
        return [{"label": self.labels[0], "score": value} for value in logits[:, 0].tolist()]


def _numbers(texts: Any, column: str) -> Any:
    """Convert texts, such as 0.50, to float64. Raises ``DataError`` if one is not a number."""
    try:
        return pc.utf8_trim_whitespace(texts).cast(pa.float64())
    except pa.ArrowInvalid:
        for row, text in enumerate(texts.to_pylist()):
            if not is_number(text):
                raise DataError(
                    f"{row_name(row)}: {shortened(repr(text), 80)} in column {column!r} is not a "
                    "number; write numbers such as 1234.5, without units and thousands separators"
                ) from None
        raise
