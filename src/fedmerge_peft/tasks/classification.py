"""What text and image classification share: labels told from a column, cross-entropy, the predicted class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from fedmerge_peft.data.columns import did_you_mean, join_values, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.base import Task

if TYPE_CHECKING:
    from datasets import Dataset


class Classification(Task):
    """One label an example: the loss is the cross-entropy of the logits, with no weights and no smoothing."""

    def losses(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy ``-log softmax(logits)[label]`` of each example, in float32, and ones.

        Args:
            logits: ``(batch, classes)``.
            labels: ``(batch,)``.
        """
        losses = functional.cross_entropy(logits.float(), labels, reduction="none")
        return losses, torch.ones_like(losses)

    def predict(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The likeliest class and the label of each example, both ``(batch,)``."""
        return logits.argmax(dim=-1), labels


def reject_nulls(values: Any, column: str, first: int = 0) -> None:
    """Raise ``DataError`` with the row number of the first null of an Arrow array, whose first entry is row ``first``."""
    if values.null_count:
        row = first + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"row {row} in use: column {column!r} is empty (null); fill such rows in or leave them out"
        )


def infer_labels(table: Dataset, column: str, num_labels: int | None) -> list[str]:
    """Names of the labels, in the order of their ids.

    A ``ClassLabel`` column brings its names; other texts are sorted; integers are their own names, from 0 to the largest.
    Where ``num_labels`` asks for more labels than the data show, the rest are called ``LABEL_3`` and so on.

    Args:
        table: All rows: of every client, for training, validation and testing alike.
        column: The label column.
        num_labels: How many labels the recipe says there are.

    Raises:
        DataError: For a missing column, nulls, negative or fractional numbers, or more labels than ``num_labels``.
    """
    values = _label_column(table, column)
    if not len(values):
        raise DataError(f"the data have no rows, so the labels in column {column!r} cannot be told")
    if is_text(values.type):
        names = sorted(values.unique().to_pylist())
        if num_labels is not None and len(names) > num_labels:
            raise DataError(
                f"column {column!r} has {len(names)} labels where num_labels says {num_labels}: {join_values(names)}"
            )
    else:
        ids = _integer_labels(values, column)
        if num_labels is not None:
            _reject_out_of_range(ids, column, num_labels)
        names = getattr(table.features[column], "names", None) or _numeric_names(
            ids, column, num_labels
        )
    if num_labels is None:
        return list(names)
    return [*names[:num_labels], *(f"LABEL_{label}" for label in range(len(names), num_labels))]


def encode_labels(table: Dataset, column: str, labels: Sequence[str]) -> Tensor:
    """Label ids, int64 ``(rows,)``.

    Raises:
        DataError: With row, value and column, for a label that is not one of ``labels``.
    """
    values = _label_column(table, column)
    if not is_text(values.type):
        ids = _integer_labels(values, column)
        _reject_out_of_range(ids, column, len(labels))
        return torch.from_numpy(ids)
    known = {name: label for label, name in enumerate(labels)}
    names = values.to_pylist()
    for row, name in enumerate(names):
        if name not in known:
            raise DataError(
                f"row {row} in use: {name!r} in column {column!r} is not a known label; the labels are {join_values(labels)}"
            )
    return torch.tensor([known[name] for name in names], dtype=torch.int64)


def relabel(table: Dataset, column: str, labels: Sequence[str]) -> Dataset:
    """The table with its labels numbered as ``labels`` are, however few of them it holds.

    Names (texts, or a ``ClassLabel``'s) are looked up. An integer is an id; but where numbers are among the names and stand elsewhere
    than at their own place, such as 1, 2, 3, it is looked up as a name too.

    Args:
        table: Rows from elsewhere than the federation.
        column: The label column.
        labels: Names of all labels, in the order of their ids.

    Returns:
        The same rows, in the same order; the label column is a ``ClassLabel`` with these names.

    Raises:
        DataError: With row and value, for a label that is not one of ``labels``; for a missing column, nulls, negative or fractional
            numbers.
    """
    from datasets import ClassLabel, Dataset, DatasetInfo

    values = _label_column(table, column)
    if is_text(values.type):
        found = values.to_pylist()
    else:
        ids = _integer_labels(values, column).tolist()
        ordered = all(
            not name.isdecimal() or name == str(label) for label, name in enumerate(labels)
        )
        names = getattr(table.features[column], "names", None) or (labels if ordered else ())
        found = [names[label] if label < len(names) else str(label) for label in ids]
    known = {name: label for label, name in enumerate(labels)}
    for row, name in enumerate(found):
        if name not in known:
            hint = did_you_mean(name, labels)
            raise DataError(
                f"row {row}: {name!r} in column {column!r} is not a known label{hint}; the labels are {join_values(labels)}"
            )
    rows = table.with_format("arrow")[:]
    rows = rows.set_column(
        rows.column_names.index(column),
        column,
        pa.array([known[name] for name in found], pa.int64()),
    )
    features = table.features.copy()
    features[column] = ClassLabel(names=list(labels))
    return Dataset(rows, info=DatasetInfo(features=features))


def _label_column(table: Dataset, column: str) -> Any:
    values = read_column(table, column, "task.label")
    reject_nulls(values, column)
    return values


def is_text(kind: Any) -> bool:
    """Whether an Arrow type is text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _integer_labels(values: Any, column: str) -> NDArray[np.int64]:
    """Label ids that are integers from 0 (or truth values); anything else is a ``DataError`` with its row."""
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        first = f", such as {values[0].as_py()!r} in row 0" if len(values) else ""
        raise DataError(
            f"column {column!r} holds {values.type}{first}; a label is an integer from 0, or a name: cast the column"
        )
    ids: NDArray[np.int64] = values.to_numpy().astype(np.int64)
    if (ids < 0).any():
        row = int((ids < 0).argmax())
        raise DataError(
            f"row {row} in use: label {ids[row]} in column {column!r} is negative, which the hub uses for 'no label'; drop such rows"
        )
    return ids


def _numeric_names(ids: NDArray[np.int64], column: str, num_labels: int | None) -> list[str]:
    """Integers as names of labels, one for each id from 0 to the largest."""
    row = int(ids.argmax())
    if num_labels is None and ids[row] >= max(1000, len(ids)):
        raise DataError(
            f"row {row} in use: label {ids[row]} in column {column!r} does not look like a count from 0; if it is one, set num_labels"
        )
    return [str(label) for label in range(int(ids[row]) + 1)]


def _reject_out_of_range(ids: NDArray[np.int64], column: str, num_labels: int) -> None:
    if (ids >= num_labels).any():
        row = int((ids >= num_labels).argmax())
        raise DataError(
            f"row {row} in use: label {ids[row]} in column {column!r} is too large for {num_labels} labels, 0 to {num_labels - 1}; "
            "set task.num_labels, or correct the data"
        )
