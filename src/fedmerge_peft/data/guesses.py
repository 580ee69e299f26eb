"""Guesses of the purpose of a table's columns: texts, labels, clients, splits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedmerge_peft.data.columns import read_column
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

_CLIENTS = [
    "client",
    "client_id",
    "hospital",
    "site",
    "organisation",
    "organization",
    "office",
    "clinic",
    "center",
    "centre",
    "bank",
    "user",
    "user_id",
    "author",
    "speaker",
    "writer",
    "annotator",
    "device",
    "customer",
    "department",
    "shop",
    "store",
    "school",
    "station",
    "domain",
    "source",
    "provider",
    "owner",
    "institution",
    "branch",
    "country",
    "region",
    "group",
]
_LABELS = [
    "label",
    "labels",
    "category",
    "class",
    "target",
    "intent",
    "topic",
    "sentiment",
    "queue",
    "tag",
    "y",
]
_TEXTS = [
    "text",
    "body",
    "sentence",
    "message",
    "content",
    "review",
    "question",
    "comment",
    "description",
    "title",
]
COLUMNS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "question-answering": {
        "question": ["question"],
        "context": ["context", "passage", "paragraph"],
        "answers": ["answers", "answer"],
    },
    "preference": {"prompt": ["prompt"], "chosen": ["chosen"], "rejected": ["rejected"]},
    "token-classification": {
        "words": ["tokens", "words"],
        "tags": ["ner_tags", "tags", "pos_tags", "chunk_tags"],
    },
    "sentence-embedding": {"anchor": ["anchor", "query"], "positive": ["positive"]},
    "audio-classification": {"audio": ["audio", "sound"], "label": _LABELS},
    "seq2seq-lm": {
        "source": ["source", "document", "article", "src"],
        "target": ["target", "summary", "highlights", "tgt"],
    },
}
"""Usual names of columns, by task and key. A table with a column for each key fits the task."""
_SCORES = ["score", "similarity", "rating", *_LABELS]
"""Usual names of columns of numbers to predict."""
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


def guess_task(columns: Iterable[Column], rows: int) -> str:
    """Return the task whose columns a table has."""
    known = {column.name: column for column in columns}
    if any(column.kind == "image" for column in known.values()):
        return "image-classification"
    for task, roles in COLUMNS.items():
        if all(_named(known.values(), names) for names in roles.values()):
            return task
    chats = {"prompt", "completion"}, {"instruction", "output"}, {"messages"}, {"conversations"}
    if any(names <= known.keys() for names in chats):
        return "causal-lm"
    if guess_score(known.values()):
        return "text-regression"
    if guess_label_sets(known.values()):
        return "multi-label-classification"
    return "sequence-classification" if guess_label(known.values(), rows, ()) else "causal-lm"


def guess_role(columns: Iterable[Column], task: str, key: str) -> str | None:
    """Return the column for a key of a task of ``COLUMNS``; None without a usual name."""
    return _named(columns, COLUMNS[task][key])


def guess_score(columns: Iterable[Column]) -> str | None:
    """Return a column of numbers to predict: one with a usual name that has fractions."""
    return _named((each for each in columns if each.kind == "fraction"), _SCORES)


def guess_label_sets(columns: Iterable[Column]) -> str | None:
    """Return a column of lists of labels: one with a usual name."""
    return _named((each for each in columns if each.kind == "other"), _LABELS)


def guess_image(columns: Iterable[Column]) -> str | None:
    """Return the column of images; None without one."""
    return next((column.name for column in columns if column.kind == "image"), None)


def guess_text(columns: Iterable[Column], taken: Iterable[str]) -> str | None:
    """Return the column of texts: one with a usual name, or that with the longest texts."""
    texts = [each for each in _free(columns, taken) if each.kind == "text" and each.length > 0]
    return (
        _named(texts, _TEXTS)
        or max(((each.length, each.name) for each in texts), default=(0, None))[1]
    )


def guess_label(columns: Iterable[Column], rows: int, taken: Iterable[str]) -> str | None:
    """Return the column of labels: one with a usual name, or that with the fewest values."""
    fit = [
        each
        for each in _free(columns, taken)
        if 2 <= each.distinct <= min(_MOST_LABELS, rows / 2) and each.name.lower() not in _CLIENTS
    ]
    fewest = min(((each.distinct, each.name) for each in fit), default=(0, None))[1]
    return _named(fit, _LABELS) or fewest


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


def _named(columns: Iterable[Column], names: Iterable[str]) -> str | None:
    """Return the first column that has one of the names, in the order of the names."""
    there: Mapping[str, str] = {column.name.lower(): column.name for column in columns}
    return next((there[name] for name in names if name in there), None)


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
