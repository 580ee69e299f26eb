"""Registration of the built-in metrics, before the sections that accept their names."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from fedmerge_peft.plugins import METRICS

_CORRELATION = (-1.0, 1.0)
_ERROR: Mapping[str, Any] = {"range": (0.0, math.inf), "greater_is_better": False}
_FUNCTIONS = {"rougeL": "rouge_l", "mrr": "mean_reciprocal_rank"}
"""Name of the function by name of the metric, where the two differ."""


def _register(module: str, of: tuple[str, ...], about: Mapping[str, str], **facts: Any) -> None:
    """Register metrics of one module that compare the same outputs.

    The range is 0 to 1, unless ``facts`` has another one.
    """
    for name, text in about.items():
        code = f"fedmerge_peft.tasks.{module}:{_FUNCTIONS.get(name, name)}"
        METRICS.add(name, code, about=text, of=of, **{"range": (0.0, 1.0), **facts})


_register("metrics", ("loss",), {"perplexity": "exp of the mean loss; lower is better."}, **_ERROR)
_register(
    "metrics",
    ("classes", "tokens"),
    {"accuracy": "Fraction of the classes or tokens that are predicted correctly."},
    per_example=True,
)
_register("metrics", ("classes",), {"f1": "F1 of each class, averaged with equal weights (macro)."})
_register(
    "calibration",
    ("class_scores", "label_scores"),
    {
        "expected_calibration_error": "Mean absolute difference between the predicted probability "
        "and the accuracy in each of 15 bins of predictions; lower is better."
    },
    greater_is_better=False,
)
_register(
    "metrics",
    ("classes",),
    {"matthews_correlation": "Correlation of predicted and expected classes, from -1 to 1."},
    range=_CORRELATION,
)
_register(
    "metrics",
    ("texts",),
    {"exact_match": "Fraction of the generated texts that equal the references."},
    per_example=True,
)
_register(
    "metrics",
    ("texts",),
    {"rougeL": "F-measure of the longest common subsequence of words, in any script."},
)
_register(
    "text_metrics",
    ("texts",),
    {
        "bleu": "BLEU of all generated texts, by sacrebleu.",
        "chrf": "chrF of all generated texts, the F-score of character n-grams, by sacrebleu.",
    },
)
_register(
    "text_metrics",
    ("answers",),
    {"squad_f1": "F1 of the words of each answer, as in SQuAD."},
)
_register(
    "text_metrics",
    ("answers",),
    {"squad_exact_match": "Fraction of the answers that equal a reference, as in SQuAD."},
    per_example=True,
)
_register(
    "text_metrics",
    ("vectors",),
    {
        "mrr": "Mean reciprocal rank of an anchor's nearest positive among the positives and "
        "negatives of all examples."
    },
)
_register(
    "text_metrics",
    ("vectors",),
    {
        "recall_at_1": "Fraction of the anchors whose nearest text is one of their positives.",
        "recall_at_10": "Fraction of the anchors with one of their positives among the 10 "
        "nearest texts.",
    },
    per_example=True,
)
_register(
    "entity_metrics",
    ("tags",),
    {
        "entity_f1": "Harmonic mean of entity_precision and entity_recall.",
        "entity_precision": "Fraction of the predicted entities with the right type and borders.",
        "entity_recall": "Fraction of the expected entities that are found, with type and borders.",
    },
    entities=True,
)
_register(
    "entity_metrics", ("tags",), {"tag_accuracy": "Fraction of the words with the right tag."}
)
_register(
    "value_metrics",
    ("values",),
    {
        "mse": "Mean squared error; lower is better.",
        "mae": "Mean absolute error; lower is better.",
    },
    **_ERROR,
)
_register(
    "value_metrics",
    ("values",),
    {
        "pearson": "Pearson's correlation of predicted and true values, from -1 to 1.",
        "spearman": "Correlation of the ranks of predicted and true values, from -1 to 1.",
    },
    range=_CORRELATION,
)
_register(
    "label_set_metrics",
    ("label_sets",),
    {
        "micro_f1": "F1 over all pairs of an example and a label.",
        "macro_f1": "F1 of each label, averaged with equal weights.",
    },
)
_register(
    "label_set_metrics",
    ("label_scores",),
    {
        "average_precision": "Area under the curve of precision and recall of each label, "
        "averaged (macro)."
    },
)
_register(
    "metrics",
    ("rewards",),
    {"reward_accuracy": "Fraction of the pairs whose chosen completion has the higher reward."},
    per_example=True,
)
_register(
    "metrics",
    ("rewards",),
    {"reward_margin": "Mean difference of the rewards of chosen and rejected completions."},
    range=(-math.inf, math.inf),
)


def compares(metrics: Iterable[str], kind: str) -> bool:
    """Return True if one of these metrics compares outputs of a kind, such as ``texts``."""
    return any(kind in METRICS[name].facts["of"] for name in metrics)
