"""Read the columns of a data set, match values, and encode classes."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fedmerge_peft.data.clients import Indices
from fedmerge_peft.data.column_types import LARGEST_EXACT, plain_column, whole_numbers
from fedmerge_peft.errors import DataError
from fedmerge_peft.util.text import closest, lookalikes, shortened

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.section import Scalar

logger = logging.getLogger(__name__)

MAX_CLASSES = 100_000
"""Maximum number of different labels, or of values of a column by which rows are partitioned."""
LONGEST_NAME = 1_000
"""Maximum length of the name of a column, label, client or group, in characters."""
SHOWN_VALUES = 20


def join_values(values: Iterable[object], limit: int = SHOWN_VALUES) -> str:
    """Join values with commas. Values beyond ``limit`` are only counted."""
    names = [str(value) for value in values]
    more = f", … and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def is_number(text: str) -> bool:
    """Return True if a text can be converted to a number, such as ``-1.5``."""
    try:
        pa.scalar(text.strip()).cast(pa.float64())
    except pa.ArrowInvalid:
        return False
    return True


def did_you_mean(wrong: object, names: Iterable[object]) -> str:
    """Return `` (did you mean x?)`` with the closest name; an empty string if no name is close."""
    close = closest(str(wrong), map(str, names))
    if close is None:
        return ""
    if unicodedata.normalize("NFC", close) == unicodedata.normalize("NFC", str(wrong)):
        return f" (did you mean {close!a}, which only looks the same as {str(wrong)!a}?)"
    return f" (did you mean {close}?)"


def check_column(table: Dataset, name: str, key: str) -> None:
    """Raise ``DataError`` if a table lacks a column; the message begins with the recipe key."""
    if name not in table.column_names:
        raise DataError(
            f"{key}: there is no column {name!r}{did_you_mean(name, table.column_names)}; "
            f"the data have {join_values(table.column_names)}"
        )


def no_client(name: object, names: Iterable[str]) -> str:
    """Return ``has no client ...; it has ...``, for messages whose subject is the run."""
    known = list(names)
    return f"has no client {name!r}{did_you_mean(name, known)}; it has {join_values(known)}"


def warn_of_lookalikes(names: Iterable[str], key: str, kind: str) -> None:
    """Log a warning if names differ only in case, spaces, invisible characters or Unicode form.

    Args:
        names: Names of labels or clients.
        key: Recipe key with which the warning begins, such as ``task.label``.
        kind: Plural noun for the names.
    """
    if groups := lookalikes(names):
        shown = "; ".join(" and ".join(map(ascii, group[:3])) for group in groups[:3])
        more = f", and {len(groups) - 3:,} more" if len(groups) > 3 else ""
        logger.warning(
            "%s: %s that look alike are counted as different ones: %s%s; write them in the same "
            "way if they are the same",
            key,
            kind,
            shown,
            more,
        )


def class_label(names: Sequence[str], other: Sequence[str] | None) -> str:
    """Describe a ClassLabel column by its class names, to show how it differs from another column.

    The description has the first five names. If the names differ from those of the other column
    only after the fifth, it has the first difference instead.

    Args:
        names: Class names of the column.
        other: Class names of the other column, or None if that is not a ClassLabel column.
    """
    pairs = enumerate(zip_longest(names, other or ()))
    place = next((number for number, (own, its) in pairs if own != its), 0)
    if other is None or place < 5:
        return f"ClassLabel({join_values(names, 5)})"
    shown = f"name {place} is {names[place]}" if place < len(names) else f"no name {place}"
    return f"ClassLabel({len(names)} names, from 0; {shown})"


def read_column(dataset: Dataset, name: str, key: str) -> Any:
    """Read a column as a ``pyarrow.ChunkedArray`` with one entry per row.

    Args:
        dataset: Data set; if rows were selected from it, only these are read.
        name: Column.
        key: Recipe key that names the column, for error messages.

    Raises:
        DataError: The column does not exist; its entries are lists, records or bytes; or
            ``plain_column`` rejects them.
    """
    check_column(dataset, name, key)
    column = dataset.select_columns([name]).with_format("arrow")[:].column(name)
    column = plain_column(column, name, lambda row: f"{key}: row {row} (from 0)")
    if pa.types.is_nested(column.type) or _is_bytes(column.type):
        raise DataError(
            f"{key}: the column {name} has the type {shortened(str(column.type), 80)}; "
            "choose a column of plain values (text, numbers)"
        )
    return column


def _is_bytes(kind: Any) -> bool:
    return bool(
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
    )


def value_name(dataset: Dataset, column: str, value: object) -> str:
    """Return the display name of a value: its class name in a ClassLabel column, else its text."""
    names = getattr(dataset.features[column], "names", None)
    known = names is not None and isinstance(value, int) and 0 <= value < len(names)
    return str(names[value]) if names is not None and known else str(value)


def value_names(dataset: Dataset, column: str, key: str) -> list[str]:
    """Return the display names of the sorted distinct values of a column, without nulls."""
    return [
        value_name(dataset, column, value)
        for value in _distinct(read_column(dataset, column, key)).to_pylist()
    ]


def encode_classes(
    splits: Mapping[str, Dataset], column: str, key: str, *, lists: bool = False
) -> tuple[dict[str, Indices], list[str]]:
    """Assign numbers to the distinct values of a column in the training split, in sorted order.

    Args:
        splits: Data sets by split, including ``train``.
        column: Column.
        key: Recipe key that names the column, for error messages.
        lists: True to replace each list by its first value.

    Returns:
        Class numbers ``(rows,)`` of each split, and the names of the classes in the order of their
        numbers. A value that does not occur in the training split has the number -1.

    Raises:
        DataError: The column cannot be read (``read_column``); it has nulls, blank texts,
            infinities or floats that are too large to be exact; or it has too many distinct
            values, or one that is too long.
    """
    firsts = (
        {split: first_of_lists(dataset, column) for split, dataset in splits.items()}
        if lists
        else splits
    )
    columns = {split: read_column(dataset, column, key) for split, dataset in firsts.items()}
    for split, entries in columns.items():
        missing = pc.sum(pc.is_null(entries, nan_is_null=True)).as_py() or 0
        if pa.types.is_string(entries.type) or pa.types.is_large_string(entries.type):
            blank = pc.equal(pc.utf8_length(pc.utf8_trim_whitespace(entries)), 0)
            missing += pc.sum(blank).as_py() or 0
        if missing:
            # Rows are divided by data.split_column before data.filter is applied.
            whole = key == "data.split_column"
            rows = "rows" if whole else f"{split} rows"
            hint = "" if whole else " (data.filter selects rows by value)"
            raise DataError(
                f"{key}: the column {column} is empty in {missing:,} of the {len(entries):,} "
                f"{rows}; fill in the values, or remove the rows{hint}"
            )
    columns = dict(zip(columns, whole_numbers(list(columns.values())), strict=True))
    for entries in columns.values():
        _reject_inexact(entries, column, key)
    values = _distinct(columns["train"])
    numbers = {
        split: _to_numpy(pc.fill_null(pc.index_in(entries, value_set=values), -1))
        for split, entries in columns.items()
    }
    names = [value_name(firsts["train"], column, value) for value in values.to_pylist()]
    check_class_names(names, f"{key}: the column {column}")
    return numbers, names


def check_class_names(names: Sequence[str], subject: str) -> None:
    """Raise ``DataError`` if there are too many names, or one is too long to be a name.

    Records, figures and messages contain all names. A column of texts in place of labels or clients
    would make them unreadable.

    Args:
        names: Distinct values.
        subject: Beginning of the message, which names the column.
    """
    if len(names) > MAX_CLASSES:
        raise DataError(
            f"{subject} has {len(names):,} different values, and at most {MAX_CLASSES:,} are "
            "supported; name another column"
        )
    longest = max(names, key=len, default="")
    if len(longest) > LONGEST_NAME:
        raise DataError(
            f"{subject} has a value of {len(longest):,} characters ({longest[:30]!r}…), and at "
            f"most {LONGEST_NAME:,} are supported; name a column of short names"
        )


def first_of_lists(dataset: Dataset, column: str) -> Dataset:
    """Return a data set with this column only, in which each list is replaced by its first value.

    An empty list becomes null. If the column does not contain lists, the data set is returned
    unchanged.
    """
    from datasets import Dataset, Features

    inner = getattr(dataset.features.get(column), "feature", None)
    if inner is None:
        return dataset
    entries = dataset.select_columns([column]).with_format("arrow")[:].column(column)
    values = pc.list_slice(entries.combine_chunks(), 0, 1)
    firsts = [(items or [None])[0] for items in values.to_pylist()]
    return Dataset.from_dict({column: firsts}, features=Features({column: inner}))


def _reject_inexact(entries: Any, column: str, key: str) -> None:
    """Raise ``DataError`` for infinities, and for floats too large to be exact integers."""
    if pa.types.is_floating(entries.type):
        infinite = entries.filter(pc.is_inf(entries))
        if len(infinite):
            raise DataError(
                f"{key}: the column {column} has {infinite[0].as_py()!r}, which cannot be a "
                "class; correct the value, or remove its rows"
            )
        inexact = entries.filter(pc.greater_equal(pc.abs(entries), float(LARGEST_EXACT)))
        if len(inexact):
            raise DataError(
                f"{key}: the column {column} has {inexact[0].as_py()!r}, which is too large to be "
                f"exact as {entries.type}; store the column as integers or text"
            )


def matching_rows(
    dataset: Dataset, column: str, values: Sequence[Scalar], key: str
) -> tuple[Indices, set[Scalar]]:
    """Find the rows whose value in ``column`` is one of ``values``.

    Values are converted to the column's type: ``3`` matches the text "3", and the name of a
    ClassLabel matches its number.

    Args:
        dataset: Data set.
        column: Column.
        values: Values to match.
        key: Recipe key of the filter, for error messages.

    Returns:
        Row numbers, and the subset of ``values`` that occurs.

    Raises:
        DataError: The column cannot be read (``read_column``).
    """
    entries = read_column(dataset, column, key)
    typed = {value: _as_type(value, entries.type, dataset.features[column]) for value in values}
    mask = pc.is_in(
        entries,
        value_set=pa.array([value for value in typed.values() if value is not None], entries.type),
    )
    occurring = set(pc.unique(entries.filter(mask)).to_pylist())
    return np.flatnonzero(mask.to_numpy()).astype(np.int64), {
        value for value, converted in typed.items() if converted in occurring
    }


def _as_type(value: Scalar, type: Any, feature: Any) -> Any:
    """Convert a value to the column's type. Return None if that is impossible."""
    if isinstance(value, str) and hasattr(feature, "names"):
        return feature.names.index(value) if value in feature.names else None
    if pa.types.is_string(type) or pa.types.is_large_string(type):
        return str(value)
    if pa.types.is_boolean(type) and not isinstance(value, str) and value not in (0, 1):
        return None  # Arrow would convert it to true
    try:
        return pa.scalar(value).cast(type).as_py()
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _distinct(entries: Any) -> Any:
    """Return the sorted distinct values as a ``pyarrow.Array``, without nulls."""
    values = pc.drop_null(pc.unique(entries))
    return values.take(pc.sort_indices(values))


def _to_numpy(entries: Any) -> Indices:
    numbers: Indices = entries.to_numpy().astype(np.int64)
    return numbers
