"""Columns of multiple choice: the context and the choices of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.column_types import as_text
from fedmerge_peft.data.columns import join_values, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.tasks.choice_labels import read_right
from fedmerge_peft.tasks.labels import is_text
from fedmerge_peft.tasks.lists import read_lists
from fedmerge_peft.tasks.row_names import row_name
from fedmerge_peft.tasks.tokenization import read_texts

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.text_tasks import MultipleChoiceRecipe


def read_rows(
    table: Dataset, recipe: MultipleChoiceRecipe
) -> tuple[list[str], list[list[str]], list[int]]:
    """Read contexts, choices, and indices of the right choices.

    If the recipe names a column of starts, each choice is preceded by its row's start. Raises
    ``DataError`` if the columns do not match the recipe.
    """
    contexts = read_texts(table, recipe.context, "task.context")
    choices, names = read_choices(table, recipe.choices)
    right = read_right(table, recipe.label, choices, names)
    if recipe.start is not None:
        starts = _texts(table, recipe.start, "task.start")
        pairs = zip(starts, choices, strict=True)
        choices = [[f"{start or ''} {choice}" for choice in own] for start, own in pairs]
    return contexts, choices, right


def read_choices(
    table: Dataset, columns: str | Sequence[str]
) -> tuple[list[list[str]], list[list[str]] | None]:
    """Read the choices of each row, and their names; names are None if the column has none.

    Args:
        table: Rows.
        columns: Column with lists of texts, or with records ``{text: [...], label: [...]}`` of
            texts and their names; or several columns with one text each. A row with fewer choices
            has nulls in the last columns.

    Raises:
        DataError: A column does not exist or has an unsuitable type; a list or a value in it is
            missing; a row has fewer than two choices, lacks a choice before its
            last, or has more or fewer names than choices.
    """
    names = None
    if not isinstance(columns, str):
        texts = zip(*(_texts(table, column, "task.choices") for column in columns), strict=True)
        rows = [_without_missing(row, own, columns) for row, own in enumerate(texts)]
    elif {f"{columns}.text", f"{columns}.label"} <= {*_parts(table, columns).column_names}:
        parts = _parts(table, columns)
        rows = _lists(parts, f"{columns}.text")
        names = _lists(parts, f"{columns}.label")
    else:
        rows = _lists(table, columns)
    for row, choices in enumerate(rows):
        if len(choices) < 2:
            raise DataError(
                f"{row_name(row)}: {len(choices)} choice{'s' * (len(choices) != 1)} in "
                f"{_named(columns)}, expected two or more; add the others, or remove the row"
            )
        if names is not None and len(names[row]) != len(choices):
            raise DataError(
                f"{row_name(row)}: in {_named(columns)}, the list text has {len(choices)} entries, "
                f"but the list label has {len(names[row])}; correct the row, or remove it"
            )
    return rows, names


def _parts(table: Dataset, column: str) -> Dataset:
    """Return the fields of a column of records, as columns such as ``choices.text``."""
    return table.select_columns([column] if column in table.column_names else []).flatten()


def _lists(table: Dataset, column: str) -> list[list[str]]:
    lists = read_lists(table, column, "task.choices")
    names = getattr(getattr(table.features[column], "feature", None), "names", None)
    return lists.rows([names[n] if names else str(n) for n in lists.values.to_pylist()])


def _named(columns: str | Sequence[str]) -> str:
    if isinstance(columns, str):
        return f"column {columns!r}"
    return f"the columns {join_values(columns)}"


def _texts(table: Dataset, column: str, key: str) -> list[str | None]:
    values = read_column(table, column, key)
    texts: list[str | None] = (values if is_text(values.type) else as_text(values)).to_pylist()
    return texts


def _without_missing(row: int, texts: Sequence[str | None], columns: Sequence[str]) -> list[str]:
    known = [text for text in texts if text is not None]
    if None in texts[: len(known)]:
        raise DataError(
            f"{row_name(row)}: column {columns[texts.index(None)]!r} is empty "
            "(null), but a later choice is not; fill it in, or move the later ones"
        )
    return known


def is_row(given: Any, keys: Set[str]) -> bool:
    """Return True for a dictionary with exactly these keys and with valid values.

    The value of ``choices`` is a list of 2 or more texts. Other values are texts.
    """
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
