"""Confusion matrices of a run: all clients together, and one by one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedmerge_peft.report.tables import Cell, Column
from fedmerge_peft.runs.confusion import counted, matrix, read_confusion, used_labels
from fedmerge_peft.runs.directory import RunDirectory

Counts = Counter[tuple[int, int]]
_MAX_LABELS = 20
"""Limit on the labels of a matrix. With more, the most confused pairs are listed."""
_MAX_PAIRS = 15
_MAX_CLIENTS = 50
"""Limit on clients that have a matrix each; the chosen ones have the lowest accuracy."""
_NAMED = 3
"""Limit on the pairs that the sentence above the matrices names."""

_PAIR_COLUMNS = [
    Column("true label", "text"),
    Column("predicted", "text"),
    Column("number"),
    Column("share of the true label"),
]


@dataclass(frozen=True)
class ConfusionTable:
    """Counts of one or all clients: a matrix or, for many labels, the most confused pairs."""

    title: str
    labels: Sequence[str]
    """Labels of rows and columns; empty if ``pairs`` are listed."""
    rows: Sequence[tuple[str, Sequence[tuple[int, float]]]]
    """True label, and for each predicted label the count and its share of the row."""
    columns: Sequence[Column]
    pairs: Sequence[Sequence[Cell]]
    """Rows of a table with these ``columns``; empty for a matrix, or if no example is confused."""


def confusion_tables(run: RunDirectory) -> dict[str, Any] | None:
    """Return the template's variables, or None if the run has no confusion matrices.

    The variables are a text (``answer``), the table of all clients together (``all``), one table
    for each of at most ``_MAX_CLIENTS`` clients (``clients``), and the number of the other clients
    (``more``).
    """
    matrices = read_confusion(run)
    if matrices is None:
        return None
    labels, clients = matrices
    counts = {name: counted([pairs]) for name, pairs in clients.items()}
    worst = sorted(counts, key=lambda name: _accuracy(counts[name]))[:_MAX_CLIENTS]
    total = counted(clients.values())
    things = "words" if run.recipe.task.label_column is None else "examples"
    return {
        "answer": _answer(total, labels, things),
        "all": _confusion("All clients", total, labels),
        "clients": [
            _confusion(f"{name}, accuracy {_accuracy(counts[name]):.3f}", counts[name], labels)
            for name in worst
        ],
        "more": len(counts) - len(worst),
    }


def confused_pairs(counts: Counts) -> list[tuple[int, int]]:
    """Return the pairs (true, predicted) of different labels, the most frequent first."""
    wrong = [pair for pair in counts if pair[0] != pair[1]]
    return sorted(wrong, key=lambda pair: (-counts[pair], pair))


def _answer(counts: Counts, labels: Sequence[str], things: str) -> str:
    text = f"{_right(counts):,} of {counts.total():,} test {things} are labeled right."
    named = [
        f"{labels[true]} as {labels[predicted]} ({counts[true, predicted]:,})"
        for true, predicted in confused_pairs(counts)[:_NAMED]
    ]
    return f"{text} Most frequent errors: {', '.join(named)}." if named else text


def _confusion(title: str, counts: Counts, labels: Sequence[str]) -> ConfusionTable:
    """Return a matrix of the labels that occur or, with too many, the most confused pairs."""
    used = used_labels(counts)
    if len(used) > _MAX_LABELS:
        sums: Counts = Counter()
        for (true, _), count in counts.items():
            sums[true, true] += count
        pairs = [
            [
                Cell.of(labels[true]),
                Cell.of(labels[predicted]),
                Cell(f"{counts[true, predicted]:,}", str(counts[true, predicted])),
                Cell.of(counts[true, predicted] / sums[true, true]),
            ]
            for true, predicted in confused_pairs(counts)[:_MAX_PAIRS]
        ]
        return ConfusionTable(title, [], [], _PAIR_COLUMNS, pairs)
    names = [labels[label] for label in used]
    table = matrix(counts, used)
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    rows = [
        (name, list(zip(own.tolist(), parts.tolist(), strict=True)))
        for name, own, parts in zip(names, table, shares, strict=True)
    ]
    return ConfusionTable(title, names, rows, [], [])


def _right(counts: Counts) -> int:
    return sum(count for (true, predicted), count in counts.items() if true == predicted)


def _accuracy(counts: Counts) -> float:
    return _right(counts) / max(counts.total(), 1)
