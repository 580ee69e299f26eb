"""Columns of multiple choice: the choices of each row, and the place of the right one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedmerge_peft.data.column_types import as_text, whole_numbers
from fedmerge_peft.data.columns import join_values, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.labels import is_text, reject_nulls
from fedmerge_peft.tasks.lists import read_lists
from fedmerge_peft.tasks.tokenization import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.text_tasks import MultipleChoiceRecipe


def read_rows(
    table: Dataset, recipe: MultipleChoiceRecipe
) -> tuple[list[str], list[list[str]], list[int]]:
    """Read the contexts, the choices with the text before each, and the places of the right ones.

    Raises ``DataError`` if the columns do not match the recipe.
    """
    contexts = read_texts(table, recipe.context, "task.context")
    choices = read_choices(table, recipe.choices)
    right = read_right(table, recipe.label, choices)
    if recipe.start is not None:
        starts = read_texts(table, recipe.start, "task.start")
        pairs = zip(starts, choices, strict=True)
        choices = [[f"{start} {choice}" for choice in own] for start, own in pairs]
    return contexts, choices, right


def read_choices(table: Dataset, columns: str | Sequence[str]) -> list[list[str]]:
    """Read the choices of each row.

    Args:
        table: Rows.
        columns: Column with lists of texts; or columns with one text each, of which a row with
            fewer choices lacks the last ones.

    Raises:
        DataError: A column does not exist or has no texts, or a row has fewer than two choices, or
            lacks one before the last.
    """
    if isinstance(columns, str):
        lists = read_lists(table, columns, "task.choices")
        rows = lists.rows([str(value) for value in lists.values.to_pylist()])
    else:
        texts = zip(*(_texts(table, column) for column in columns), strict=True)
        rows = [_without_missing(row, own, columns) for row, own in enumerate(texts)]
    for row, choices in enumerate(rows):
        if len(choices) < 2:
            raise DataError(
                f"row {row} (of the rows in use): {_named(columns)} has {len(choices)} choice(s), "
                "expected two or more; add the others, or remove the row"
            )
    return rows


def _named(columns: str | Sequence[str]) -> str:
    if isinstance(columns, str):
        return f"column {columns!r}"
    return f"the columns {join_values(columns)}"


def _texts(table: Dataset, column: str) -> list[str | None]:
    values = read_column(table, column, "task.choices")
    texts: list[str | None] = (values if is_text(values.type) else as_text(values)).to_pylist()
    return texts


def _without_missing(row: int, texts: Sequence[str | None], columns: Sequence[str]) -> list[str]:
    known = [text for text in texts if text is not None]
    if None in texts[: len(known)]:
        raise DataError(
            f"row {row} (of the rows in use): column {columns[texts.index(None)]!r} is empty "
            "(null), but a later choice is not; fill it in, or move the later ones"
        )
    return known


def read_right(table: Dataset, column: str, choices: Sequence[Sequence[str]]) -> list[int]:
    """Read the place of the right choice in each row.

    Labels are numbers from 0; or letters from A, or the texts of choices. Numbers may be written as
    text if all labels are.

    Args:
        table: Rows.
        column: Column with the labels.
        choices: Choices of each row.

    Raises:
        DataError: The column does not exist, has nulls, or is neither text nor whole numbers; or a
            label is none of the row's choices, or may be several of them.
    """
    (values,) = whole_numbers([read_column(table, column, "task.label")])
    reject_nulls(values, column)
    if len(values) and not (is_text(values.type) or pa.types.is_integer(values.type)):
        raise DataError(
            f"task.label: column {column!r} has the type {values.type}, expected "
            "numbers from 0, letters from A, or the texts of the right choices"
        )
    labels = values.to_pylist()
    numbered = not is_text(values.type) or all(label.strip().isdecimal() for label in labels)
    right = []
    for row, (label, own) in enumerate(zip(labels, choices, strict=True)):
        places = _places(label, own, numbered=numbered)
        if len(places) != 1:
            fault = f"may be each of the choices {join_values(places)}" if places else "is none"
            raise DataError(
                f"row {row} (of the rows in use): {label!r} in column {column!r} {fault} of "
                f"{len(own)} choices; write the number of the right choice, from 0 to "
                f"{len(own) - 1}"
            )
        right.append(places[0])
    return right


def _places(label: Any, choices: Sequence[str], *, numbered: bool) -> list[int]:
    """Return the places of the choices that a label may stand for, in ascending order."""
    text = str(label).strip()
    letter = ascii_uppercase.find(text) if len(text) == 1 else -1
    places = {int(text) if numbered else letter} & {*range(len(choices))}
    if isinstance(label, str):
        places |= {place for place, choice in enumerate(choices) if choice.strip() == text}
    return sorted(places)


def is_row(given: Any, keys: Set[str]) -> bool:
    """Return True for a dictionary with these keys of texts and, as choices, two texts or more."""
    return (
        isinstance(given, Mapping)
        and given.keys() == keys
        and isinstance(given["choices"], list)
        and len(given["choices"]) > 1
        and all(
            isinstance(text, str)
            for key, value in given.items()
            for text in (value if key == "choices" else [value])
        )
    )
