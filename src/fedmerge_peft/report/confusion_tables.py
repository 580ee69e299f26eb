"""Confusion matrices of a run: all clients together, and one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.report.tables import Cell, Column
from fedmerge_peft.runs.confusion import matrix, read_confusion
from fedmerge_peft.runs.directory import RunDirectory

_MAX_LABELS = 20
"""Labels of a matrix; with more, the most confused pairs are listed."""
_MAX_PAIRS = 15
_MAX_CLIENTS = 50
"""Clients with a matrix each, those with the lowest accuracy."""
_NAMED = 3
"""Pairs that the sentence above the matrices names."""

_PAIR_COLUMNS = [
    Column("true label", "text"),
    Column("predicted", "text"),
    Column("number"),
    Column("share of the true label"),
]


@dataclass(frozen=True)
class Confusion:
    """Counts of one or all clients: a matrix, or the most confused pairs of many labels."""

    title: str
    labels: Sequence[str]
    """Labels of rows and columns; empty for pairs."""
    rows: Sequence[tuple[str, Sequence[tuple[int, float]]]]
    """True label; count and share in the row of each predicted label."""
    columns: Sequence[Column]
    pairs: Sequence[Sequence[Cell]]
    """Rows of a table with the columns; empty for a matrix."""


def confusion_tables(run: RunDirectory) -> dict[str, Any] | None:
    """Return the sentence, the matrix of all clients and those of single ones; None for none."""
    found = read_confusion(run)
    if found is None:
        return None
    labels, clients = found
    counts = {name: matrix([pairs], len(labels)) for name, pairs in clients.items()}
    worst = sorted(counts, key=lambda name: _accuracy(counts[name]))[:_MAX_CLIENTS]
    total = matrix(clients.values(), len(labels))
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


def confused_pairs(counts: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return the pairs (true, predicted) of different labels that occur, most frequent first."""
    wrong = counts.copy()
    np.fill_diagonal(wrong, 0)
    order = np.argsort(-wrong, axis=None, kind="stable")[: np.count_nonzero(wrong)]
    rows, columns = np.unravel_index(order, wrong.shape)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _answer(counts: NDArray[np.int64], labels: Sequence[str], things: str) -> str:
    right, total = int(np.trace(counts)), int(counts.sum())
    text = f"{right:,} of {total:,} test {things} are labeled right."
    named = [
        f"{labels[true]} as {labels[predicted]} ({counts[true, predicted]:,})"
        for true, predicted in confused_pairs(counts)[:_NAMED]
    ]
    return f"{text} Most frequent errors: {', '.join(named)}." if named else text


def _confusion(title: str, counts: NDArray[np.int64], labels: Sequence[str]) -> Confusion:
    """Return a matrix of the labels that occur, or the most confused pairs of many labels."""
    used = np.flatnonzero(counts.any(axis=0) | counts.any(axis=1)).tolist()
    sums = counts.sum(axis=1)
    if len(used) > _MAX_LABELS:
        pairs = [
            [
                Cell.of(labels[true]),
                Cell.of(labels[predicted]),
                Cell(f"{counts[true, predicted]:,}", str(counts[true, predicted])),
                Cell.of(float(counts[true, predicted] / sums[true])),
            ]
            for true, predicted in confused_pairs(counts)[:_MAX_PAIRS]
        ]
        return Confusion(title, [], [], _PAIR_COLUMNS, pairs)
    shares = counts / np.maximum(sums, 1)[:, None]
    rows = [
        (labels[true], [(int(counts[true, k]), float(shares[true, k])) for k in used])
        for true in used
    ]
    return Confusion(title, [labels[k] for k in used], rows, [], [])


def _accuracy(counts: NDArray[np.int64]) -> float:
    return float(np.trace(counts) / counts.sum())
