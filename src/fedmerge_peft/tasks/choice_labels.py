"""Labels of multiple choice: the number, letter, name or text of each row's right choice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedmerge_peft.data.column_types import whole_numbers
from fedmerge_peft.data.columns import join_values, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import is_text, reject_nulls
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_MANY_ROWS = 20
"""Smallest number of rows for a warning that the first choice is never right. In so many rows, this
is unlikely to happen by chance."""


def read_right(
    table: Dataset,
    column: str,
    choices: Sequence[Sequence[str]],
    names: Sequence[Sequence[str]] | None = None,
) -> list[int]:
    """Read the index of the right choice in each row.

    A label is the name or the text of a choice. If all labels are names, texts do not count, so
    that a name may also be the text of another choice. Without names, a label may also be a letter
    from A or, if all labels are numbers, a number from 0. Numbers may be written as text.

    Args:
        table: Rows.
        column: Column with the labels.
        choices: Choices of each row.
        names: Names of the choices of each row, such as A, B and C, or 1, 2 and 3; or None.

    Raises:
        DataError: The column does not exist, has nulls, or is neither text nor whole numbers; or a
            label matches none or several of the row's choices.
    """
    labels = _labels(table, column)
    if names is not None:
        rows = [
            _places(label, [""] * len(own), own) for label, own in zip(labels, names, strict=True)
        ]
        if not all(rows):
            rows = [_places(*row) for row in zip(labels, choices, names, strict=True)]
        return _only(rows, labels, choices, column, names)
    numbers = [isinstance(label, int) or label.strip().isdecimal() for label in labels]
    by_number = [
        _places(label, own, [*map(str, range(len(own)))])
        for label, own in zip(labels, choices, strict=True)
    ]
    if all(numbers):
        right = _only(by_number, labels, choices, column)
        _warn_without_zero(right, column)
        return right
    rows = [_places(*row, ascii_uppercase) for row in zip(labels, choices, strict=True)]
    # If most labels are numbers, an invalid label is reported before the valid numbers.
    if 2 * sum(numbers) > len(labels) and not all(rows):
        _only([own or by_number[row] for row, own in enumerate(rows)], labels, choices, column)
    return _only(rows, labels, choices, column)


def _labels(table: Dataset, column: str) -> list[Any]:
    """Return labels as texts or integers.

    Numbers of a ``ClassLabel`` are replaced by their names, unless all names are numbers. Negative
    numbers stay.
    """
    (values,) = whole_numbers([read_column(table, column, "task.label")])
    reject_nulls(values, column)
    if len(values) and not (is_text(values.type) or pa.types.is_integer(values.type)):
        raise DataError(
            f"task.label: column {column!r} has the type {values.type}, expected "
            "text or whole numbers that identify the right choices; convert it, or name "
            "another column"
        )
    labels: list[Any] = values.to_pylist()
    names = getattr(table.features[column], "names", None)
    if names is None or all(name.isdecimal() for name in names):
        return labels
    return [names[label] if label >= 0 else label for label in labels]


def _places(label: Any, choices: Sequence[str], names: Sequence[str]) -> list[int]:
    """Return the indices of the choices that a label may stand for, in ascending order."""
    text = str(label).strip()
    if not text:
        return []
    known = {text, text.lstrip("0") or "0"} if text.isdecimal() else {text}  # 01 is 1
    named = zip(choices, [*names, *[""] * len(choices)], strict=False)
    return [
        place
        for place, (choice, name) in enumerate(named)
        if name.strip() in known or (isinstance(label, str) and choice.strip() == text)
    ]


def _only(
    rows: Sequence[Sequence[int]],
    labels: Sequence[Any],
    choices: Sequence[Sequence[str]],
    column: str,
    names: Sequence[Sequence[str]] | None = None,
) -> list[int]:
    """Return the only index of each row; raise ``DataError`` for rows with none or several."""
    for row, places in enumerate(rows):
        if len(places) != 1:
            label, count = labels[row], len(choices[row])
            shown = shortened(repr(label), 80)
            fault = f"is none of {count} choices"
            if places:
                numbers = f"numbers {join_values(places)}, from 0"
                fault = f"matches more than one of {count} choices ({numbers})"
            remedy = (
                f"write all labels as numbers (in this row from 0 to {count - 1}), or all as "
                "letters or texts of the choices"
            )
            if names is not None:
                remedy = f"write the name of the right choice: one of {join_values(names[row])}"
                if len(set(names[row])) < count:
                    remedy = "give each choice of the row a name of its own"
            if str(label).strip() in ("", "-1"):
                remedy = (
                    "rows without a label are common in test splits on the hub; remove them, or "
                    "name another split in data.test_split"
                )
            elif names is None and str(label).strip() == str(count):
                remedy += "; if the labels start at 1, subtract 1 from all of them"
            raise DataError(f"{row_name(row)}: {shown} in column {column!r} {fault}; {remedy}")
    return [place for (place,) in rows]


def _warn_without_zero(right: Sequence[int], column: str) -> None:
    if len(right) >= _MANY_ROWS and min(right) > 0:
        logger.warning(
            "task.label: no row has 0 in column %r, so the first choice is never right; if the "
            "labels start at 1, subtract 1 from all of them",
            column,
        )
