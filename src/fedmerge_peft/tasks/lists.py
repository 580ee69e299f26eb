"""Columns with a list in each row: words, and names or ids of labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fedmerge_peft.data.columns import (
    check_class_names,
    check_column,
    warn_of_lookalikes,
)
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import MANY_LABELS, is_text, label_ids, reject_nulls, with_column
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class ListColumn:
    """Concatenated values of a column of lists, and the number of values in each row."""

    column: str
    key: str
    """Recipe key that names the column."""
    values: Any
    """Arrow array of all values, without nulls."""
    lengths: NDArray[np.int64]
    """Number of values in each row, ``(rows,)``."""

    def where(self, position: int) -> str:
        """Return the row and the column of a value, for error messages."""
        row = int(np.searchsorted(np.cumsum(self.lengths), position, side="right"))
        return f"{row_name(row)}: column {self.column!r}"

    def rows(self, values: Sequence[Any]) -> list[list[Any]]:
        """Split a sequence with one entry per value of the column into rows."""
        ends = np.cumsum(self.lengths).tolist()
        return [
            list(values[end - size : end]) for end, size in zip(ends, self.lengths, strict=True)
        ]


def read_lists(table: Dataset, column: str, key: str) -> ListColumn:
    """Read a column of lists of texts or integers.

    Args:
        table: Rows.
        column: Column.
        key: Recipe key that names the column, for error messages.

    Raises:
        DataError: The column does not exist; its entries are not lists of texts or integers; a list
            or a value in it is missing.
    """
    check_column(table, column, key)
    entries = table.select_columns([column]).with_format("arrow")[:].column(column)
    entries = entries.combine_chunks()
    kind = entries.type
    if pa.types.is_fixed_size_list(kind):
        entries = entries.cast(pa.list_(kind.value_type))
    elif not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        remedy = "choose another column"
        if is_text(kind):
            remedy = "write lists (in a file, as Parquet or JSON Lines), or choose another column"
        raise DataError(
            f"{key}: column {column!r} has the type {shortened(str(kind), 80)}, expected lists, "
            f'such as ["Ada", "lives"]; {remedy}'
        )
    reject_nulls(entries, column)
    values = entries.flatten()
    lengths = pc.list_value_length(entries).to_numpy(zero_copy_only=False).astype(np.int64)
    lists = ListColumn(column, key, values, lengths)
    if values.null_count:
        position = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
        raise DataError(
            f"{lists.where(position)} has a list with an empty value (null); fill it in, or remove "
            "the row"
        )
    if len(values) and not (is_text(values.type) or pa.types.is_integer(values.type)):
        raise DataError(
            f"{key}: column {column!r} has lists of {shortened(str(values.type), 80)}, expected "
            "lists of texts or integers; choose another column"
        )
    return lists


def infer_list_labels(table: Dataset, column: str, key: str) -> list[str]:
    """Infer the names of the labels in a column of lists, in the order of their ids.

    Names of a ``ClassLabel`` keep their order, texts are sorted, and integers are named ``0`` to
    the largest.

    Raises:
        DataError: See ``read_lists``; there are no labels, or too many; a label is empty, too long,
            negative or too large.
    """
    lists = read_lists(table, column, key)
    if names := _class_names(table, column):
        return list(names)
    if not len(lists.values):
        raise DataError(
            f"{key}: column {column!r} has no values to infer labels from; add some, or name "
            "another column"
        )
    if is_text(lists.values.type):
        texts = lists.values.to_pylist()
        if (
            blank := next((n for n, text in enumerate(texts) if not text.strip()), None)
        ) is not None:
            raise DataError(
                f"{lists.where(blank)} has a list with an empty label; fill it in, or remove it"
            )
        labels = sorted(set(texts))
        check_class_names(labels, f"{key}: the column {column}")
        warn_of_lookalikes(labels, key, "labels")
        return labels
    ids = _ids(lists, None)
    if (largest := int(ids.max())) >= max(MANY_LABELS, len(lists.lengths)):
        raise DataError(
            f"{lists.where(int(ids.argmax()))} has the label {largest}, which is too large for a "
            "label id; write the names of the labels instead"
        )
    return [str(label) for label in range(largest + 1)]


def encode_lists(table: Dataset, column: str, key: str, labels: Sequence[str]) -> list[list[int]]:
    """Convert lists of labels to ids.

    Texts are looked up by name. Integers are ids in ``labels``, except those of a ``ClassLabel``
    with other names: they are looked up by the name of the class.

    Raises:
        DataError: See ``read_lists``; or a label is not in ``labels``.
    """
    lists = read_lists(table, column, key)
    names = _class_names(table, column)
    if is_text(lists.values.type):
        texts = lists.values.to_pylist()
    elif names and list(names) != list(labels):
        texts = [names[label] for label in _ids(lists, len(names)).tolist()]
    else:
        return lists.rows(_ids(lists, len(labels)).tolist())
    return lists.rows(label_ids(texts, labels, lists.where))


def relabel_lists(table: Dataset, column: str, key: str, labels: Sequence[str]) -> Dataset:
    """Convert a column of lists to lists of a ``ClassLabel`` with the names ``labels``.

    Arguments and errors are those of ``encode_lists``.
    """
    from datasets import ClassLabel, List

    ids = pa.array(encode_lists(table, column, key, labels), pa.list_(pa.int64()))
    return with_column(table, column, ids, List(ClassLabel(names=list(labels))))


def reject_indicators(table: Dataset, column: str, key: str) -> None:
    """Raise ``DataError`` if lists seem to contain a 0 or 1 for each label instead of label ids."""
    lists = read_lists(table, column, key)
    if not len(lists.values) or is_text(lists.values.type) or _class_names(table, column):
        return
    length = int(lists.lengths[0])
    if length > 1 and (lists.lengths == length).all() and _ids(lists, None).max() <= 1:
        raise DataError(
            f"{key}: all lists in column {column!r} have {length} values, 0 or 1, so they seem to "
            "have one for each label; write lists of the ids of the labels that apply, or one "
            "column of 0 and 1 for each label"
        )


def _class_names(table: Dataset, column: str) -> list[str] | None:
    return getattr(getattr(table.features[column], "feature", None), "names", None)


def _ids(lists: ListColumn, count: int | None) -> NDArray[np.int64]:
    """Return the ids; raise ``DataError`` for an id outside 0 to ``count`` - 1 (None: no limit)."""
    ids: NDArray[np.int64] = lists.values.to_numpy(zero_copy_only=False).astype(np.int64)
    wrong = ids < 0 if count is None else (ids < 0) | (ids >= count)
    if wrong.any():
        position = int(wrong.argmax())
        limit = "" if count is None else f" to {count - 1}"
        raise DataError(
            f"{lists.where(position)} has the label {ids[position]}, expected ids from 0{limit}"
        )
    return ids
