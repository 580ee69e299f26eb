"""Metrics of predicted numbers, computed by scikit-learn and SciPy.

A correlation is ``nan`` if the true values are all equal, or if there is only one. Otherwise, it is
0 if the predicted values are all equal: they contain no information about the true values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Values = Sequence[float]


def mse(predicted: Values, expected: Values) -> float:
    """Compute the mean squared error."""
    from sklearn.metrics import mean_squared_error

    return float(mean_squared_error(expected, predicted))


def mae(predicted: Values, expected: Values) -> float:
    """Compute the mean absolute error."""
    from sklearn.metrics import mean_absolute_error

    return float(mean_absolute_error(expected, predicted))


def pearson(predicted: Values, expected: Values) -> float:
    """Compute Pearson's correlation."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predicted, expected)


def spearman(predicted: Values, expected: Values) -> float:
    """Compute Spearman's rank correlation."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predicted, expected)


def _correlation(function: Any, predicted: Values, expected: Values) -> float:
    if len(set(expected)) < 2:
        return math.nan
    return 0.0 if len(set(predicted)) < 2 else float(function(predicted, expected).statistic)
