"""Columns of a data set: read as Arrow arrays, matched against values, numbered as classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.section import Scalar

SHOWN_VALUES = 20


def join_values(values: Iterable[object], most: int = SHOWN_VALUES) -> str:
    """The values with commas between them; from ``most`` on, only how many more there are."""
    names = [str(value) for value in values]
    more = f", … and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def did_you_mean(wrong: object, names: Iterable[object]) -> str:
    """`` (did you mean x?)`` where some name is close, else nothing."""
    close = get_close_matches(str(wrong), [str(name) for name in names], n=1, cutoff=0.7)
    return f" (did you mean {close[0]}?)" if close else ""


def read_column(dataset: Dataset, name: str, key: str) -> Any:
    """One column as a ``pyarrow.ChunkedArray``, one entry a row of the data set.

    Args:
        dataset: Any data set; selections are honoured.
        name: The column.
        key: The recipe's key that asks for it, for the error text.

    Raises:
        DataError: There is no such column, or its entries are lists or records.
    """
    if name not in dataset.column_names:
        raise DataError(
            f"{key}: there is no column {name!r}{did_you_mean(name, dataset.column_names)}; the data have {join_values(dataset.column_names)}"
        )
    column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    if pa.types.is_nested(column.type):
        raise DataError(
            f"{key}: the column {name} holds {column.type}; a column of plain values (text, numbers) is needed here"
        )
    return column


def value_name(dataset: Dataset, column: str, value: object) -> str:
    """How a value is shown: a ClassLabel's name, else the value itself."""
    names = getattr(dataset.features[column], "names", None)
    known = names is not None and isinstance(value, int) and 0 <= value < len(names)
    return str(names[value]) if names is not None and known else str(value)


def value_names(dataset: Dataset, column: str, key: str) -> list[str]:
    """The distinct values of a column as they are shown, in order, nulls left out."""
    return [
        value_name(dataset, column, value)
        for value in _distinct(read_column(dataset, column, key)).to_pylist()
    ]


def encode_classes(
    splits: Mapping[str, Dataset], column: str, key: str
) -> tuple[dict[str, Indices], list[str]]:
    """Number the values that a column has in training, in sorted order.

    Returns:
        For each split, one class number a row (-1 where the value is not in training), and the C names of the classes.

    Raises:
        DataError: The column is absent, nested, or has missing values (nulls) in some split.
    """
    columns = {split: read_column(dataset, column, key) for split, dataset in splits.items()}
    for split, entries in columns.items():
        missing = pc.sum(pc.is_null(entries, nan_is_null=True)).as_py() or 0
        if missing:
            raise DataError(
                f"{key}: the column {column} is empty in {missing:,} of the {len(entries):,} {split} rows; "
                "fill them in or leave those rows out (data.filter keeps rows by value)"
            )
    values = _distinct(columns["train"])
    numbers = {
        split: _to_numpy(pc.fill_null(pc.index_in(entries, value_set=values), -1))
        for split, entries in columns.items()
    }
    return numbers, [value_name(splits["train"], column, value) for value in values.to_pylist()]


def matching_rows(
    dataset: Dataset, column: str, wanted: Sequence[Scalar], key: str
) -> tuple[Indices, set[Scalar]]:
    """Rows whose column has one of the wanted values, and those of the wanted values that do occur.

    A value is read as the column's type: ``3`` matches the text "3", and a name matches the ClassLabel's number.
    """
    entries = read_column(dataset, column, key)
    typed = {value: _as_type(value, entries.type, dataset.features[column]) for value in wanted}
    mask = pc.is_in(
        entries,
        value_set=pa.array([value for value in typed.values() if value is not None], entries.type),
    )
    found = set(pc.unique(entries.filter(mask)).to_pylist())
    return np.flatnonzero(mask.to_numpy()).astype(np.int64), {
        value for value, same in typed.items() if same in found
    }


def _as_type(value: Scalar, type: Any, feature: Any) -> Any:
    """The value as the column would hold it; None where it cannot."""
    if isinstance(value, str) and hasattr(feature, "names"):
        return feature.names.index(value) if value in feature.names else None
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return str(value)
    try:
        return pa.scalar(value).cast(type).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _distinct(entries: Any) -> Any:
    """A ``pyarrow.Array`` of the sorted distinct values."""
    values = pc.drop_null(pc.unique(entries))
    return values.take(pc.sort_indices(values))


def _to_numpy(entries: Any) -> Indices:
    numbers: Indices = entries.to_numpy().astype(np.int64)
    return numbers
