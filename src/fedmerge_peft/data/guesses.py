"""Guesses of the purpose of a table's columns: texts, labels, clients, splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.plugins import TASKS
from fedmerge_peft.recipe.usual_columns import KINDS, LABEL, UsualColumn

if TYPE_CHECKING:
    from datasets import Dataset

_CLIENTS = (
    "client client_id hospital site organisation organization office clinic center centre "
    "bank user user_id author speaker writer annotator device customer department shop store "
    "school station domain source provider owner institution branch country region group"
)
_SPLITS = {"train", "training", "validation", "valid", "dev", "test"}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_MOST_LABELS = 200
_FEWEST_ROWS = 4
"""Least mean number of rows per value in a column that names clients."""


@dataclass(frozen=True)
class Column:
    """One column of a table."""

    name: str
    kind: str
    """text, number, fraction (numbers that are not all whole), image or other."""
    distinct: int
    """Number of different values; 0 for images and others."""
    length: float
    """Mean number of characters of a text."""
    example: str
    is_value: bool = False
    """True if the name is a number or one of the values, as in a table without a header line."""

    def __str__(self) -> str:
        values = f"{self.distinct:,} different" if self.distinct else self.kind
        return f"{self.name} ({values}, such as {self.example!r})"


def describe(table: Dataset) -> list[Column]:
    """Return the columns of a table."""
    return [_column(table, name) for name in table.column_names]


def guess_task(columns: Sequence[Column], rows: int) -> str | None:
    """Return the task with the most specific columns that a table has; None without any."""
    names = {column.name for column in columns}
    fit: list[tuple[list[int], str]] = []
    for task, section in TASKS.sections().items():
        usual = section.usual_columns.values()
        if any(names.issuperset(known.split()) for known in section.known_columns):
            kinds = ["named"]
        elif all(each.optional or guess_column(each, columns, rows) for each in usual):
            kinds = [each.kind for each in usual]
        else:
            continue
        fit.append(([*sorted(map(KINDS.index, kinds)), len(KINDS)], task))
    return min(fit, key=lambda pair: pair[0], default=(None, None))[1]


def guess_column(
    usual: UsualColumn, columns: Iterable[Column], rows: int, taken: Iterable[str] = ()
) -> str | None:
    """Return the column that is most likely what a task reads; None if none is."""
    free = _free(columns, taken)
    match usual.kind:
        case "image":
            return next((column.name for column in free if column.kind == "image"), None)
        case "text":  # one with a usual name, or that with the longest texts
            texts = [each for each in free if each.kind == "text" and each.length > 0]
            longest = max(((each.length, each.name) for each in texts), default=(0, None))[1]
            return _named(texts, usual.names) or longest
        case "label":
            return guess_label(free, rows, ())
        case "number":
            return _named((each for each in free if each.kind == "fraction"), usual.names)
        case "list":
            return _named((each for each in free if each.kind == "other"), usual.names)
        case _:
            return _named(free, usual.names)


def guess_label(columns: Iterable[Column], rows: int, taken: Iterable[str]) -> str | None:
    """Return the column of labels: one with a usual name, or that with the fewest values."""
    fit = [
        each
        for each in _free(columns, taken)
        if 2 <= each.distinct <= min(_MOST_LABELS, rows / 2)
        and each.name.lower() not in _CLIENTS.split()
    ]
    fewest = min(((each.distinct, each.name) for each in fit), default=(0, None))[1]
    return _named(fit, LABEL.names) or fewest


def guess_client(columns: Iterable[Column], rows: int, taken: Iterable[str]) -> str | None:
    """Return the column of clients: one with a usual name, or the text with the most values."""
    fit = [
        each for each in _free(columns, taken) if 2 <= each.distinct <= max(2, rows / _FEWEST_ROWS)
    ]
    texts = ((each.distinct, each.name) for each in fit if each.kind == "text")
    return _named(fit, _CLIENTS) or max(texts, default=(0, None))[1]


def guess_split(table: Dataset) -> str | None:
    """Return the column whose values are names of splits; None without one."""
    for name in table.column_names:
        if "split" in name.lower() and (values := _values(table, name)) is not None:
            found = {str(value).lower() for value in values.unique().to_pylist()}
            if "train" in found and found <= _SPLITS:
                return str(name)
    return None


def _free(columns: Iterable[Column], taken: Iterable[str]) -> list[Column]:
    return [column for column in columns if column.name not in set(taken)]


def _named(columns: Iterable[Column], names: str) -> str | None:
    """Return the first column that has one of the names, in the order of the names."""
    there: Mapping[str, str] = {column.name.lower(): column.name for column in columns}
    return next((there[name] for name in names.split() if name in there), None)


def _column(table: Dataset, name: str) -> Column:
    from datasets import Image

    values = None if isinstance(table.features[name], Image) else _values(table, name)
    if values is None:
        kind = "image" if isinstance(table.features[name], Image) else "other"
        return Column(name, kind, 0, 0.0, kind)
    known = [value for value in values.unique().to_pylist() if value is not None]
    first = str(known[0]) if known else ""
    texts = [value for value in known if isinstance(value, str)]
    if texts and len(texts) == len(known) and all(map(_is_image, texts)):
        return Column(name, "image", 0, 0.0, first[:40])
    length = sum(map(len, texts)) / len(texts) if texts else 0.0
    kind = "text" if texts else "number"
    if any(isinstance(value, float) and value % 1 for value in known):
        kind = "fraction"
    return Column(name, kind, len(known), length, first[:40], name in texts or _is_number(name))


def _values(table: Dataset, name: str) -> Any:
    """Return a column of plain values; None for lists, records and bytes."""
    try:
        return read_column(table, name, "column")
    except DataError:
        return None


def _is_image(text: str) -> bool:
    return Path(text).suffix.lower() in _IMAGES


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
