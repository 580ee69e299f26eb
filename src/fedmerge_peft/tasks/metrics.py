"""Scores of predictions by the registered metrics, and metrics of classes, texts and rewards.

A client may have too few examples for a metric to be defined. By convention, a metric without
examples is ``nan``. The F1 of a class that is never predicted is 0. The Matthews correlation is 0
if only one class is expected or predicted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.plugins import METRICS
from fedmerge_peft.recipe.error_messages import found
from fedmerge_peft.recipe.metrics import compares
from fedmerge_peft.tasks.words import words
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from fedmerge_peft.tasks.base import ComputeMetrics
    from fedmerge_peft.tasks.predictions import Predictions

_ROUNDING = 1e-6
"""Rounding error by which a loss or a metric may leave its range."""


def score(names: Iterable[str], predictions: Predictions) -> dict[str, float]:
    """Compute the mean loss and the named metrics.

    Args:
        names: Registered metrics.
        predictions: Loss, and the outputs and references that the metrics compare.

    Returns:
        ``loss`` and the metrics by name. The loss is the mean over the loss terms, in nats; for
        regression, it is the mean squared error. Most metrics are fractions from 0 to 1.
        Correlations are from -1 to 1. Perplexity is ``exp`` of the loss (``inf`` on overflow).
        Squared and absolute errors and reward margins have no upper limit. A value without examples
        is ``nan``, and so is a metric that the outputs do not define, such as Pearson's
        correlation with constant references.
    """
    loss = predictions.loss_sum / predictions.count if predictions.count else math.nan
    scores = {"loss": loss}
    for name in names:
        if METRICS[name].facts["of"] == ("loss",):
            scores[name] = _compute(name, loss)
            continue
        known = predictions.outputs
        outputs = next((known[kind] for kind in METRICS[name].facts["of"] if kind in known), None)
        # metric(name).compute is not used here: it writes the predictions to an Arrow table first.
        # That takes about 3 ms for each client, split and round, much longer than the computation.
        scores[name] = _compute(name, *outputs) if outputs and outputs[1] else math.nan
    return scores


def own_scores(
    compute: ComputeMetrics, names: Iterable[str], predictions: Predictions
) -> dict[str, float]:
    """Compute metrics with a function that a Python program passes.

    Args:
        compute: The function. Its arguments are predictions and references: texts if a metric of
            the task needs generated texts, else the first kind that ``Task.outputs`` returns, such
            as class ids.
        names: Names of the task's metrics, which the function must not return.
        predictions: Outputs and references.

    Raises:
        RecipeError: The result is not a mapping from names to numbers, or a name is taken.
    """
    outputs = predictions.outputs
    result: Any = compute(*(outputs.get("texts") or next(iter(outputs.values()))))
    if not isinstance(result, Mapping):
        raise RecipeError(
            f"metrics: the function returned {found(result)}, expected numbers by name"
        )
    for name, value in result.items():
        if not isinstance(name, str):
            raise RecipeError(
                f"metrics: the function returned a value named {found(name)}, expected a text as "
                "its name"
            )
        if name in ("loss", *names):
            raise RecipeError(f"metrics: the name {name!r} is already taken; choose another")
        if not isinstance(value, Real):
            raise RecipeError(f"metrics: {name} is {found(value)}, expected a number")
    return {name: float(value) for name, value in result.items()}


def _compute(name: str, *arguments: Any) -> float:
    """Call a metric's function. Raises ``PluginError`` if the function of a plugin fails."""
    entry = METRICS[name]
    with entry.named_in_errors("metric"):
        return float(entry.load()(*arguments))


def greater_is_better(name: str) -> bool:
    """Return True if larger values of a metric, or of ``loss``, are better.

    For a metric that is not registered, larger values count as better.
    """
    if name == "loss":
        return False
    return name not in METRICS or bool(METRICS[name].facts.get("greater_is_better", True))


def greater_score_is_better(name: str) -> bool:
    """Return True if larger values of a score, such as ``test_accuracy``, are better."""
    return greater_is_better(name.partition("_")[2])


def facts_of(score: str) -> Mapping[str, Any]:
    """Return the facts with which a score's metric is registered, such as its ``range``.

    The result is empty for the loss and for metrics that are not registered.

    Args:
        score: Name of the score, such as ``test_accuracy``.
    """
    name = score.partition("_")[2]
    return METRICS[name].facts if name in METRICS else {}


def is_fraction(score: str) -> bool:
    """Return True if a score's metric is registered with the range from 0 to 1."""
    return facts_of(score).get("range") == (0.0, 1.0)


def score_fault(
    scores: Mapping[str, float], metrics: Sequence[str], lowest_loss: float
) -> str | None:
    """Return the first fault in scores from another machine; None if they match the task.

    Args:
        scores: Values by name, such as ``test_accuracy``.
        metrics: The task's metrics.
        lowest_loss: Lower bound of the loss: 0 for built-in tasks, −∞ for tasks of plugins.
    """
    ranges = {"loss": (lowest_loss, math.inf)} | {
        name: METRICS[name].facts.get("range", (-math.inf, math.inf)) for name in metrics
    }
    for full_name, value in scores.items():
        part, _, name = full_name.partition("_")
        if part not in ("validation", "test") or name not in ranges:
            return f"it has a score that the task does not have: {printable(full_name)}"
        low, high = ranges[name]
        if not low - _ROUNDING <= value <= high + _ROUNDING:
            return f"{full_name} is {value:g}, expected a number from {low:g} to {high:g}"
    return None


@cache
def metric(name: str) -> Any:
    """Return an offline ``evaluate.Metric`` that calls a registered metric.

    ``metric("accuracy").compute(predictions=[0, 1], references=[0, 0])`` returns
    ``{"accuracy": 0.5}``. The object is for programs that expect metrics of ``evaluate``; ``score``
    calls the registered functions. The import of ``evaluate`` takes seconds.

    Args:
        name: Name of a metric that compares class ids or texts.

    Raises:
        KeyError: The metric is unknown.
    """
    import evaluate
    from datasets import Features, Value

    compute = METRICS[name].load()
    dtype = "string" if compares([name], "texts") else "int64"

    class Offline(evaluate.Metric):  # type: ignore[misc]
        def _info(self) -> Any:
            features = Features({"predictions": Value(dtype), "references": Value(dtype)})
            return evaluate.MetricInfo(description=name, citation="", features=features)

        def _compute(
            self, predictions: Sequence[Any], references: Sequence[Any]
        ) -> dict[str, float]:
            return {name: float(compute(predictions, references))}

    return Offline(keep_in_memory=True)


def perplexity(loss: float) -> float:
    """Compute ``exp(loss)``; ``inf`` on overflow."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def accuracy(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Compute the fraction of ids that are predicted correctly."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(np.asarray(expected), np.asarray(predicted)))


def f1(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Compute the macro average of F1 over the classes that are expected or predicted."""
    from sklearn.metrics import f1_score

    return float(
        f1_score(np.asarray(expected), np.asarray(predicted), average="macro", zero_division=0)
    )


def matthews_correlation(predicted: Sequence[int], expected: Sequence[int]) -> float:
    """Compute the Matthews correlation of predicted and expected classes, from -1 to 1."""
    from sklearn.metrics import matthews_corrcoef

    if len(set(expected)) < 2 or len(set(predicted)) < 2:
        return 0.0  # scikit-learn's value, without its warning
    return float(matthews_corrcoef(np.asarray(expected), np.asarray(predicted)))


def exact_match(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the fraction of generated texts that equal their references."""
    return float(
        np.mean([text == reference for text, reference in zip(generated, references, strict=True)])
    )


def reward_accuracy(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Compute the fraction of pairs whose chosen completion has the higher reward."""
    return float(np.mean(np.greater(chosen, rejected)))


def reward_margin(chosen: Sequence[float], rejected: Sequence[float]) -> float:
    """Compute the mean of the chosen completion's reward minus the rejected completion's reward."""
    return float(np.mean(np.subtract(chosen, rejected)))


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the mean ROUGE-L F-measure (Lin 2004), without stemming.

    ROUGE-L compares texts by their longest common subsequence of ``words``. Two texts without
    words have the score 1 if they are equal, and 0 otherwise.
    """
    scorer = _rouge_scorer()
    return float(
        np.mean(
            [
                scorer.score(reference, text)["rougeL"].fmeasure
                if words(reference) or words(text)
                else float(text == reference)
                for text, reference in zip(generated, references, strict=True)
            ]
        )
    )


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer
    from rouge_score.tokenizers import Tokenizer

    class Words(Tokenizer):  # type: ignore[misc]
        def tokenize(self, text: str) -> list[str]:
            return words(text)

    return RougeScorer(["rougeL"], tokenizer=Words())
