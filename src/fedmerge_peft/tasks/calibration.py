"""Calibration: agreement of predicted probabilities with the accuracy of predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from fedmerge_peft.recipe.metrics import compares
from fedmerge_peft.tasks.predictions import Compared

_BINS = 15


def class_scores(metrics: Sequence[str], logits: Tensor, labels: Tensor) -> dict[str, Compared]:
    """Return ``{"class_scores": (probabilities, labels)}``; ``{}`` if no metric compares these.

    Args:
        metrics: Names of the task's metrics.
        logits: ``(n, classes)``.
        labels: ``(n,)``.
    """
    if not compares(metrics, "class_scores"):
        return {}
    return {"class_scores": (logits.float().softmax(dim=-1).tolist(), labels.tolist())}


def expected_calibration_error(predicted: Sequence[Sequence[float]], expected: Any) -> float:
    """Compute Σ_b n_b/n · |accuracy_b - confidence_b| over 15 bins of equal width.

    Predictions are in the bin of their confidence, the probability of the most likely class (Guo et
    al., ICML 2017, arXiv 1706.04599). Bins include their upper limit, and the first one also 0.

    Args:
        predicted: Probabilities, ``(n, classes)``. If an example has several labels,
            ``(n, labels)``; each label is then a binary prediction.
        expected: Class ids, ``(n,)``; or 0 and 1, ``(n, labels)``.
    """
    scores, true = np.asarray(predicted, dtype=np.float64), np.asarray(expected)
    if true.ndim == 2:
        scores, true = np.stack([1 - scores.ravel(), scores.ravel()], axis=1), true.ravel()
    confidence, right = scores.max(axis=1), scores.argmax(axis=1) == true
    edges = np.linspace(0, 1, _BINS + 1)[1:-1]
    bins = np.digitize(confidence, edges, right=True)
    gaps = np.bincount(bins, weights=right - confidence, minlength=_BINS)
    return float(np.abs(gaps).sum() / len(true))
