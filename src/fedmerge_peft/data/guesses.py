"""Guess the purpose of a table's columns: texts, labels, clients, splits."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import is_number, read_column
from fedmerge_peft.errors import DataError
from fedmerge_peft.plugins import TASKS
from fedmerge_peft.recipe.usual_columns import KINDS, LABEL, NUMBER, UsualColumn

if TYPE_CHECKING:
    from datasets import Dataset

_CLIENTS = (
    "client client_id hospital site organisation organization office clinic center centre "
    "bank user user_id author speaker writer annotator device customer department shop store "
    "school station domain source provider owner institution branch country region group"
)
_SPLITS = {"train", "training", "validation", "valid", "dev", "test"}
_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
_ANSWERS = "answer answers response reply output completion chosen summary translation"
"""Usual names of columns with the texts that a language model should generate."""
_CHOICE = re.compile(
    r"((?P<stem>ending|choice|option|opt|answer|sol|solution)[ _-]?)?([a-e]|\d\d?)"
)
"""Names of columns that each contain one choice, such as ending0 and ending1, or A and B."""
_MOST_LABELS = 200
_FEWEST_ROWS = 4
"""Minimum mean number of rows per value in a column that names clients."""


@dataclass(frozen=True)
class ColumnProfile:
    """Properties of one column of a table."""

    name: str
    kind: str
    """text, image, list (of texts or integers), fraction (numbers that are not all whole), number
    (any other plain values: whole numbers, booleans, dates) or other."""
    distinct: int
    """Number of different values; 0 for the kinds image, list and other."""
    length: float
    """Mean number of characters of the different texts; 0 without texts."""
    example: str
    is_value: bool = False
    """True if the name is a number or one of the values, as in a table without a header line.
    Always False for the kinds image, list and other."""

    def __str__(self) -> str:
        if self.distinct == 1:
            return f"{self.name} (one value, {self.example!r})"
        if self.distinct:
            return f"{self.name} ({self.distinct:,} different, such as {self.example!r})"
        if not self.example:
            return f"{self.name} (no values)"
        kind = "not plain values" if self.kind == "other" else self.kind
        example = "" if self.example == self.kind else f", such as {self.example!r}"
        return f"{self.name} ({kind}{example})"


def describe(table: Dataset) -> list[ColumnProfile]:
    """Return the properties of each column of a table."""
    return [_column(table, name) for name in table.column_names]


def guess_task(columns: Sequence[ColumnProfile], rows: int, label: str | None = None) -> str | None:
    """Return the task that fits the columns; None if no task fits clearly.

    If several tasks fit, the task with the most specific columns (``KINDS``) is chosen.

    Args:
        columns: All columns, except the column of clients if it is known.
        rows: Number of rows.
        label: Column of the labels, if it is known. Other columns that could be labels (fractions,
            lists, and columns with few values) are ignored.
    """
    if any(column.name == label for column in columns):
        columns = [
            replace(column, name="label") if column.name == label else column
            for column in columns
            if column.name == label
            or column.kind in ("image", "other")
            or (column.kind != "fraction" and column.distinct > rows / 2)
        ]
    names = {column.name for column in columns}
    fit: list[tuple[list[int], str]] = []
    for task, section in TASKS.sections().items():
        usual = section.usual_columns.values()
        if any(names.issuperset(known.split()) for known in section.known_columns):
            kinds = ["named"]
        elif all(role.optional or _has(role, columns, rows) for role in usual):
            kinds = [role.kind for role in usual]
        else:
            continue
        fit.append(([*sorted(map(KINDS.index, kinds)), len(KINDS)], task))
    if not fit:
        return None
    ranks, best = min(fit, key=lambda pair: pair[0])
    best_kinds = {KINDS[rank] for rank in ranks[:-1]}
    return None if _is_doubtful(best_kinds, columns, rows) else best


def _has(usual: UsualColumn, columns: Sequence[ColumnProfile], rows: int) -> bool:
    match usual.kind:
        case "choices":
            return bool(guess_choices(usual, columns))
        case "label":
            return bool(_likely_labels(columns, rows))
        case _:
            return guess_column(usual, columns, rows) is not None


def _is_doubtful(kinds: Set[str], columns: Sequence[ColumnProfile], rows: int) -> bool:
    """Return True if columns of these kinds are not clear evidence for one task."""
    if "number" in kinds:  # perhaps the score of a class, or an annotator's confidence
        others = _free(columns, [guess_column(NUMBER, columns, rows)])
        if _named(_likely_labels(others, rows), LABEL.names):
            return True
        client = guess_client(others, rows, ())
        return any(
            column.kind == "text" for column in _likely_labels(_free(others, [client]), rows)
        )
    if "label" in kinds:
        return len(_likely_labels(columns, rows)) > 1
    if kinds == {"text"}:  # the other columns may be answers to the text, or scores of it
        answers = _named(columns, _ANSWERS)
        return bool(answers) or any(column.kind == "fraction" for column in columns)
    return False


def guess_column(
    usual: UsualColumn, columns: Iterable[ColumnProfile], rows: int, taken: Iterable[str] = ()
) -> str | None:
    """Return the column that most likely fits the description ``usual``; None if none fits."""
    free = _free(columns, taken)
    match usual.kind:
        case "image":
            return next((column.name for column in free if column.kind == "image"), None)
        case "text":  # the column with a usual name, or with the longest texts
            texts = [column for column in free if column.kind == "text" and column.length > 0]
            longest = max(((column.length, column.name) for column in texts), default=(0, None))[1]
            return _named(texts, usual.names) or longest
        case "label":
            return guess_label(free, rows, ())
        case "number":
            return _named((column for column in free if column.kind == "fraction"), usual.names)
        case "list":
            return _named((column for column in free if column.kind == "list"), usual.names)
        case _:
            few = min(_MOST_LABELS, rows / 2)
            fit = {
                "": free,
                "list": [column for column in free if column.kind == "list"],
                "varied": [
                    column
                    for column in free
                    if column.distinct > few or column.name.lower() not in LABEL.names.split()
                ],
            }
            return _named(fit[usual.of], usual.names)


def guess_choices(
    usual: UsualColumn, columns: Iterable[ColumnProfile], taken: Iterable[str] = ()
) -> list[str]:
    """Return the column of lists of choices, or the columns of single choices; else ``[]``.

    Of several groups of columns, such as A and B, and ending0 to ending3, the largest is returned.
    """
    free = _free(columns, taken)
    nested = [column for column in free if column.kind in ("list", "other")]
    if (name := _named(nested, usual.names)) is not None:
        return [name]
    by_stem: dict[str, list[str]] = {}
    for column in free:
        if match := _CHOICE.fullmatch(column.name.lower()):
            by_stem.setdefault(match["stem"] or "", []).append(column.name)
    several = [sorted(group) for group in by_stem.values() if len(group) > 1]
    return max(several, key=len, default=[])


def guess_label(columns: Iterable[ColumnProfile], rows: int, taken: Iterable[str]) -> str | None:
    """Return the column of labels: the one with a usual name, else the one with the fewest values.

    Return None if there is no candidate, or if several have the fewest values.
    """
    likely = _likely_labels(_free(columns, taken), rows)
    return likely[0].name if len(likely) == 1 else None


def guess_any(
    kind: str, columns: Iterable[ColumnProfile], rows: int, taken: Iterable[str]
) -> str | None:
    """Return a column for a kind of ``KINDS``, even if its name is unusual; None if none is clear.

    For ``list``, this is the only column of lists. For ``number``, it is the only column of
    fractions; without fractions, ``guess_label`` chooses among the columns of the kind number. For
    other kinds, ``guess_label`` chooses among all columns.
    """
    free = _free(columns, taken)
    match kind:
        case "number":
            fractions = [column.name for column in free if column.kind == "fraction"]
            if fractions:
                return fractions[0] if len(fractions) == 1 else None
            return guess_label([column for column in free if column.kind == "number"], rows, ())
        case "list":
            lists = [column.name for column in free if column.kind == "list"]
            return lists[0] if len(lists) == 1 else None
        case _:
            return guess_label(free, rows, ())


def _likely_labels(columns: Iterable[ColumnProfile], rows: int) -> list[ColumnProfile]:
    """Return the candidate with a usual name, else all candidates with the fewest values.

    Candidates have 2 to 200 values, at least two rows per value on average, and a name that is not
    usual for clients.
    """
    fit = [
        column
        for column in columns
        if 2 <= column.distinct <= min(_MOST_LABELS, rows / 2)
        and column.name.lower() not in _CLIENTS.split()
    ]
    if (named := _named(fit, LABEL.names)) is not None:
        return [column for column in fit if column.name == named]
    fewest = min((column.distinct for column in fit), default=0)
    return [column for column in fit if column.distinct == fewest]


def guess_client(columns: Iterable[ColumnProfile], rows: int, taken: Iterable[str]) -> str | None:
    """Return the column of clients: one with a usual name, else the text column with most values.

    Candidates have two different values, or more than two and at least four rows per value on
    average. Return None if there is none.
    """
    fit = [
        column
        for column in _free(columns, taken)
        if 2 <= column.distinct <= max(2, rows / _FEWEST_ROWS)
    ]
    texts = ((column.distinct, column.name) for column in fit if column.kind == "text")
    return _named(fit, _CLIENTS) or max(texts, default=(0, None))[1]


def guess_split(table: Dataset) -> str | None:
    """Return the column that names the split of each row; None if there is none.

    Its name contains ``split``, and all its values are names of splits, including ``train``.
    """
    for name in table.column_names:
        if "split" in name.lower() and (values := _values(table, name)) is not None:
            splits = {str(value).lower() for value in values.unique().to_pylist()}
            if "train" in splits and splits <= _SPLITS:
                return str(name)
    return None


def _free(columns: Iterable[ColumnProfile], taken: Iterable[str | None]) -> list[ColumnProfile]:
    return [column for column in columns if column.name not in set(taken)]


def _named(columns: Iterable[ColumnProfile], names: str) -> str | None:
    """Return the column with the first of the names that occurs; None if none does."""
    there: Mapping[str, str] = {column.name.lower(): column.name for column in columns}
    return next((there[name] for name in names.split() if name in there), None)


def _column(table: Dataset, name: str) -> ColumnProfile:
    from datasets import Image

    values = None if isinstance(table.features[name], Image) else _values(table, name)
    if values is None:
        kind = "image" if isinstance(table.features[name], Image) else _nested(table, name)
        return ColumnProfile(name, kind, 0, 0.0, kind)
    known = [value for value in values.unique().to_pylist() if value is not None]
    first = str(known[0]) if known else ""
    texts = [value for value in known if isinstance(value, str)]
    if texts and len(texts) == len(known) and all(map(_is_image, texts)):
        return ColumnProfile(name, "image", 0, 0.0, first[:40])
    length = sum(map(len, texts)) / len(texts) if texts else 0.0
    kind = "text" if texts else "number"
    if any(isinstance(value, float) and value % 1 for value in known):
        kind = "fraction"
    return ColumnProfile(
        name, kind, len(known), length, first[:40], name in texts or is_number(name)
    )


def _values(table: Dataset, name: str) -> Any:
    """Return the values of a column; None if they are not plain values (``read_column``)."""
    try:
        return read_column(table, name, "column")
    except DataError:
        return None


def _nested(table: Dataset, name: str) -> str:
    """Return ``"list"`` for lists of texts or integers, else ``"other"``."""
    inner = str(getattr(getattr(table.features[name], "feature", None), "dtype", ""))
    return "list" if re.fullmatch(r"(large_)?string|u?int\d+", inner) else "other"


def _is_image(text: str) -> bool:
    return Path(text).suffix.lower() in _IMAGES
