"""Metrics of sets of labels, computed by scikit-learn.

Arguments are matrices, ``(examples, labels)``. F1 is ``nan`` if no label is expected or predicted;
average precision is ``nan`` if no label is expected.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np


def micro_f1(predicted: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Compute F1 of all pairs of an example and a label: 2 TP / (2 TP + FP + FN)."""
    from sklearn.metrics import f1_score

    chosen, wanted = np.asarray(predicted), np.asarray(expected)
    if not (chosen.any() or wanted.any()):
        return math.nan
    return float(f1_score(wanted, chosen, average="micro", zero_division=0))


def macro_f1(predicted: Sequence[Sequence[int]], expected: Sequence[Sequence[int]]) -> float:
    """Compute the mean F1 of the labels that are expected or predicted."""
    from sklearn.metrics import f1_score

    chosen, wanted = np.asarray(predicted), np.asarray(expected)
    used = np.flatnonzero((chosen | wanted).any(axis=0))
    if not len(used):
        return math.nan
    scores = f1_score(wanted[:, used], chosen[:, used], average=None, zero_division=0)
    return float(np.mean(scores))


def average_precision(
    predicted: Sequence[Sequence[float]], expected: Sequence[Sequence[int]]
) -> float:
    """Compute the mean average precision of the labels that are expected.

    Args:
        predicted: Probabilities.
        expected: 1 for the labels of an example, 0 for other labels.
    """
    from sklearn.metrics import average_precision_score

    scores, wanted = np.asarray(predicted), np.asarray(expected)
    used = np.flatnonzero(wanted.any(axis=0))
    if not len(used):
        return math.nan
    return float(np.mean([average_precision_score(wanted[:, k], scores[:, k]) for k in used]))
