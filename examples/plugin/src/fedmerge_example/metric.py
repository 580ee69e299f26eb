"""Balanced accuracy: the mean recall of the classes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedmerge_peft import register_metric


@register_metric("balanced_accuracy", of="classes")
def balanced_accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Return the mean recall over the classes that occur in ``expected``."""
    hits = np.asarray(predicted) == np.asarray(expected)
    classes = np.asarray(expected)
    return float(np.mean([hits[classes == label].mean() for label in np.unique(classes)]))
