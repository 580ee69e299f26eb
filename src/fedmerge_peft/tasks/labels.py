"""Labels of examples, one in each row of a column: their names and ids."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedmerge_peft.data.column_types import whole_numbers
from fedmerge_peft.data.columns import (
    check_class_names,
    did_you_mean,
    join_values,
    read_column,
)
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

MANY_LABELS = 1_000
"""Number of integer labels, or value of ``task.num_labels``, that is always accepted. A larger
number requires as many rows."""


def blank_table(
    columns: Mapping[str, Any], rows: Sequence[Sequence[Any]], blanks: Mapping[str, tuple[Any, Any]]
) -> Dataset:
    """Convert rows to a table, and add columns with a constant value.

    Args:
        columns: Feature types by column.
        rows: Values of the columns.
        blanks: Feature type and value of each added column. An added column replaces the column of
            the same name in ``columns``.
    """
    from datasets import Dataset, Features

    types = {name: kind for name, (kind, _) in blanks.items()}
    values = {name: value for name, (_, value) in blanks.items()}
    listed = [{**dict(zip(columns, row, strict=True)), **values} for row in rows]
    return Dataset.from_list(listed, features=Features({**columns, **types}))


def reject_nulls(values: Any, column: str, first: int = 0) -> None:
    """Raise ``DataError`` if an Arrow array has nulls.

    Args:
        values: Arrow array.
        column: Name of the column, for the error message.
        first: Row number of the first entry.
    """
    if values.null_count:
        row = first + int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{row_name(row)}: column {column!r} is empty (null); "
            "fill in the values, or remove the rows"
        )


def infer_labels(table: Dataset, column: str, num_labels: int | None) -> list[str]:
    """Infer the names of the labels, in the order of their ids.

    The names of a ``ClassLabel`` keep their order. Text labels are sorted. Integer labels are named
    ``0`` to the largest integer; without ``num_labels``, a warning names integers that do not
    occur. Booleans are named ``False`` and ``True``.

    If a ``ClassLabel`` has more than ``num_labels`` names, only the first ones are returned. If
    ``num_labels`` exceeds the number of labels in the data, additional labels are named by their
    ids: if the data have three labels, the first additional label is ``LABEL_3``.

    Args:
        table: Training, validation and test rows of all clients.
        column: Label column.
        num_labels: Number of labels in the recipe; None to infer it.

    Raises:
        DataError: The column does not exist; it has nulls, or negative or fractional numbers; there
            are no rows; there are more text labels than ``num_labels``, or an integer label is not
            less than it; a name is too long, or there are too many names; ``num_labels``, or
            without it the number of integer labels, exceeds both 1,000 and the number of rows.
    """
    values = _label_column(table, column)
    if num_labels is not None and num_labels > max(MANY_LABELS, len(values)):
        raise DataError(
            f"task.num_labels: {num_labels:,} labels for {len(values):,} "
            f"row{'s' * (len(values) != 1)}; at most {max(MANY_LABELS, len(values)):,} are "
            f"accepted (the number of rows, or {MANY_LABELS:,} if there are fewer), because each "
            "adapter has weights for every label; lower task.num_labels, or remove it to infer "
            "the labels"
        )
    if not len(values):
        raise DataError(f"column {column!r}: the data have no rows to infer labels from; add rows")
    if is_text(values.type):
        names = sorted(values.unique().to_pylist())
        if num_labels is not None and len(names) > num_labels:
            raise DataError(
                f"column {column!r} has {len(names)} labels, but task.num_labels is {num_labels} "
                f"({shortened(join_values(names), 200)}); raise task.num_labels, or remove it to "
                "infer the labels"
            )
    else:
        ids = _integer_labels(values, column)
        if num_labels is not None:
            _reject_out_of_range(ids, column, num_labels)
        names = getattr(table.features[column], "names", None) or (
            ["False", "True"]
            if pa.types.is_boolean(values.type)
            else _numeric_names(ids, column, num_labels)
        )
    check_class_names(names, f"column {column!r}")
    if num_labels is None:
        return list(names)
    return [*names[:num_labels], *(f"LABEL_{label}" for label in range(len(names), num_labels))]


def encode_labels(table: Dataset, column: str, labels: Sequence[str]) -> Tensor:
    """Convert labels to ids, int64 ``(rows,)``.

    Raises:
        DataError: A label is not in ``labels``; the message names row, value and column. Or the
            column does not exist, or has nulls, or negative or fractional numbers.
    """
    values = _label_column(table, column)
    if not is_text(values.type):
        ids = _integer_labels(values, column)
        _reject_out_of_range(ids, column, len(labels))
        return torch.from_numpy(ids)

    def where(row: int) -> str:
        return f"{row_name(row)}: column {column!r}"

    return torch.tensor(label_ids(values.to_pylist(), labels, where), dtype=torch.int64)


def label_ids(
    names: Sequence[str], labels: Sequence[str], where: Callable[[int], str]
) -> list[int]:
    """Return the id of each name, which is its index in ``labels``.

    Args:
        names: Names to look up, with possible repetitions.
        labels: Names of all labels.
        where: Function from the index of a name to its row and column, for the error message.

    Raises:
        DataError: A name is not in ``labels``.
    """
    known = {name: label for label, name in enumerate(labels)}
    for place, name in enumerate(names):
        if name not in known:
            raise DataError(f"{where(place)}: {unknown_label(name, labels)}")
    return [known[name] for name in names]


def unknown_label(name: str, labels: Sequence[str]) -> str:
    """Return the end of a message about a name that is not in ``labels``."""
    hint = did_you_mean(name, labels)
    shown = shortened(repr(name), 80)
    return f"{shown} is not a known label{hint}; the labels are {join_values(labels)}"


def relabel(table: Dataset, column: str, labels: Sequence[str]) -> Dataset:
    """Convert the label column to a ``ClassLabel`` with the names ``labels``.

    Text labels and ``ClassLabel`` names are looked up by name. Integers are ids, unless some names
    are integers that differ from their ids, such as 1, 2, 3. In this case, integers are names.

    Args:
        table: Rows of a site or a newcomer, which may have a subset of the labels.
        column: Label column.
        labels: Names of all labels, in the order of their ids.

    Returns:
        The same rows in the same order.

    Raises:
        DataError: A label is not one of ``labels``; the column does not exist, or has nulls, or
            negative or fractional numbers.
    """
    from datasets import ClassLabel

    values = _label_column(table, column)
    if is_text(values.type):
        row_labels = values.to_pylist()
    else:
        numbers = _integer_labels(values, column).tolist()
        ordered = all(
            not name.isdecimal() or name == str(label) for label, name in enumerate(labels)
        )
        names = getattr(table.features[column], "names", None) or (labels if ordered else ())
        row_labels = [names[label] if label < len(names) else str(label) for label in numbers]
    ids = label_ids(row_labels, labels, lambda row: f"row {row}: column {column!r}")
    return with_column(table, column, pa.array(ids, pa.int64()), ClassLabel(names=list(labels)))


def with_column(table: Dataset, column: str, values: Any, kind: Any) -> Dataset:
    """Replace the values of a column by an Arrow array, and its feature type by ``kind``."""
    from datasets import Dataset, DatasetInfo, Features

    rows = table.with_format("arrow")[:]
    rows = rows.set_column(rows.column_names.index(column), column, values)
    return Dataset(rows, info=DatasetInfo(features=Features({**table.features, column: kind})))


def _label_column(table: Dataset, column: str) -> Any:
    (values,) = whole_numbers([read_column(table, column, "task.label")])
    reject_nulls(values, column)
    return values


def is_text(kind: Any) -> bool:
    """Return True if an Arrow type is text."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _integer_labels(values: Any, column: str) -> NDArray[np.int64]:
    """Convert booleans, or integers from 0 on, to int64; raise ``DataError`` for other labels."""
    if not (pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)):
        entries = values.to_pylist()
        fractions = entries if pa.types.is_floating(values.type) else []
        row = next((row for row, value in enumerate(fractions) if value % 1), 0)
        first = f", such as {entries[row]!r} in row {row}" if entries else ""
        raise DataError(
            f"column {column!r} has the type {values.type}{first}; a label is an integer from 0, "
            "or a name: correct the values, or name another column in task.label"
        )
    numbers = values.to_numpy()
    if len(numbers) and int(numbers.max()) > np.iinfo(np.int64).max:  # would overflow
        row = int(numbers.argmax())
        raise DataError(
            f"{row_name(row)}: label {numbers[row]} in column {column!r} is too "
            "large for a label id; convert the labels to names"
        )
    ids: NDArray[np.int64] = numbers.astype(np.int64)
    if (ids < 0).any():
        row = int((ids < 0).argmax())
        raise DataError(
            f"{row_name(row)}: label {ids[row]} in column {column!r} is negative; remove the row "
            "if it has no label (data sets on the hub mark such rows with -1), else write names "
            "instead of numbers"
        )
    return ids


def _numeric_names(ids: NDArray[np.int64], column: str, num_labels: int | None) -> list[str]:
    """Create label names ``0`` to the largest id.

    Without ``num_labels``, warn of ids that do not occur, and raise ``DataError`` if the largest id
    is at least 1,000 and at least the number of rows.
    """
    row, limit = int(ids.argmax()), max(MANY_LABELS, len(ids))
    if num_labels is None and ids[row] >= limit:
        raise DataError(
            f"{row_name(row)}: label {ids[row]} in column {column!r} is too large for a label id, "
            f"which is less than {limit:,} (the number of rows, or {MANY_LABELS:,} if there are "
            f"fewer); correct it, or write names instead of numbers, such as L{ids[row]}"
        )
    names = [str(label) for label in range(int(ids[row]) + 1)]
    if num_labels is None and (absent := sorted(set(range(len(names))) - set(ids.tolist()))):
        logger.warning(
            "column %r has integer labels, so there are %d labels from 0 on, but no row has %s; "
            "number the labels from 0 without gaps, or set task.num_labels if they are intended",
            column,
            len(names),
            join_values(absent, 5),
        )
    return names


def _reject_out_of_range(ids: NDArray[np.int64], column: str, num_labels: int) -> None:
    if (ids >= num_labels).any():
        row = int((ids >= num_labels).argmax())
        raise DataError(
            f"{row_name(row)}: label {ids[row]} in column {column!r} is too large "
            f"for {num_labels} label{'s' * (num_labels != 1)}, 0 to {num_labels - 1}; raise "
            "task.num_labels, or correct the data"
        )
