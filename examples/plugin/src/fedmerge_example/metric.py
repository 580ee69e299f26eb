"""Balanced accuracy: the mean over classes of the share that is recognized."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmerge_peft import register_metric


@register_metric("balanced_accuracy", of="classes")
def balanced_accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Mean over the expected classes of the share that is recognized."""
    hits = np.asarray(predicted) == np.asarray(expected)
    classes = np.asarray(expected)
    return float(np.mean([hits[classes == label].mean() for label in np.unique(classes)]))
