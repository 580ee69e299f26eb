"""Metrics as ``evaluate.Metric`` objects that need no hub: scikit-learn and rouge_score do the arithmetic.

Conventions where a client's few examples leave a metric undefined: no examples, ``nan``; F1 of a class that is never
predicted, 0; Matthews correlation where only one class is expected or predicted, 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from fedmerge_peft.tasks.base import Predictions

GENERATED = frozenset({"exact_match", "rougeL"})
"""Metrics of generated text; the others compare class or token ids, or come from the loss."""


def score(names: Iterable[str], predictions: Predictions) -> dict[str, float]:
    """The mean loss, under ``loss``, and each named metric.

    Args:
        names: Any of accuracy, f1, matthews_correlation, exact_match, rougeL, perplexity.
        predictions: Loss sum in nats and its count; ids for the first three, texts for the next two.

    Returns:
        Fractions from 0 to 1, but for loss (nats), perplexity (``exp`` of it; ``inf`` where that is no float) and
        Matthews correlation (-1 to 1); ``nan`` where there is nothing to score.
    """
    loss = predictions.loss_sum / predictions.count if predictions.count else math.nan
    scores = {"loss": loss}
    for name in names:
        if name == "perplexity":
            scores[name] = _exp(loss)
            continue
        said, expected = (
            (predictions.generated, predictions.references)
            if name in GENERATED
            else (predictions.predicted, predictions.expected)
        )
        # Not metric(name).compute: it writes the ids to an Arrow table first, about 3 ms a call, which exceeds the arithmetic
        # many times and would be paid for every client, split and round.
        scores[name] = (
            metric(name)._compute(predictions=said, references=expected)[name]
            if len(expected)
            else math.nan
        )
    return scores


def greater_is_better(name: str) -> bool:
    """Whether a larger value is the better one: true but for ``loss`` and ``perplexity``."""
    return name not in {"loss", "perplexity"}


@cache
def metric(name: str) -> Any:
    """The ``evaluate.Metric`` of this name, built once a process; importing ``evaluate`` takes seconds.

    ``metric("accuracy").compute(predictions=[0, 1], references=[0, 0])`` gives ``{"accuracy": 0.5}``.

    Raises:
        KeyError: For a name that has no arithmetic here.
    """
    import evaluate
    from datasets import Features, Value

    arithmetic = _ARITHMETIC[name]
    dtype = "string" if name in GENERATED else "int64"

    class Offline(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            features = Features({"predictions": Value(dtype), "references": Value(dtype)})
            return evaluate.MetricInfo(description=name, citation="", features=features)

        def _compute(
            self, predictions: Sequence[Any], references: Sequence[Any]
        ) -> dict[str, float]:
            return {name: arithmetic(predictions, references)}

    return Offline(keep_in_memory=True)


def _exp(loss: float) -> float:
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def _accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(np.asarray(expected), np.asarray(predicted)))


def _f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Mean over the classes that are expected or predicted, each with the same weight (macro average)."""
    from sklearn.metrics import f1_score

    return float(
        f1_score(np.asarray(expected), np.asarray(predicted), average="macro", zero_division=0)
    )


def _matthews_correlation(predicted: Sequence[int], expected: Sequence[int]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len(set(expected)) < 2 or len(set(predicted)) < 2:
        return 0.0  # as scikit-learn defines it, without its warning
    return float(matthews_corrcoef(np.asarray(expected), np.asarray(predicted)))


def _exact_match(generated: Sequence[str], wanted: Sequence[str]) -> float:
    return float(np.mean([one == other for one, other in zip(generated, wanted, strict=True)]))


def _rouge_l(generated: Sequence[str], wanted: Sequence[str]) -> float:
    """Mean over examples of the F-measure of the longest common subsequence of words (Lin 2004), without stemming."""
    scorer = _rouge_scorer()
    return float(
        np.mean(
            [
                scorer.score(other, one)["rougeL"].fmeasure
                for one, other in zip(generated, wanted, strict=True)
            ]
        )
    )


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"])


_ARITHMETIC: dict[str, Callable[[Sequence[Any], Sequence[Any]], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews_correlation,
    "exact_match": _exact_match,
    "rougeL": _rouge_l,
}
