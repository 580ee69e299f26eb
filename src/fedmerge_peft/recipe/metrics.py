"""Built-in metrics, which are registered before the sections that accept them."""

from __future__ import annotations

import math

from fedmerge_peft.plugins import METRICS

_ARITHMETIC = "fedmerge_peft.tasks.metrics"
_ENTITIES = "fedmerge_peft.tasks.entity_metrics"
_VALUES = "fedmerge_peft.tasks.value_metrics"
_SETS = "fedmerge_peft.tasks.label_set_metrics"
_TEXTS = "fedmerge_peft.tasks.text_metrics"

METRICS.add(
    "perplexity",
    f"{_ARITHMETIC}:perplexity",
    about="exp of the mean loss; lower is better.",
    of=("loss",),
    range=(0.0, math.inf),
    greater_is_better=False,
)
METRICS.add(
    "accuracy",
    f"{_ARITHMETIC}:accuracy",
    about="Fraction of the classes or tokens that are predicted correctly.",
    of=("classes", "tokens"),
    range=(0.0, 1.0),
)
METRICS.add(
    "f1",
    f"{_ARITHMETIC}:f1",
    about="F1 of each class, averaged with equal weights (macro).",
    of=("classes",),
    range=(0.0, 1.0),
)
METRICS.add(
    "matthews_correlation",
    f"{_ARITHMETIC}:matthews_correlation",
    about="Correlation of predicted and expected classes, from -1 to 1.",
    of=("classes",),
    range=(-1.0, 1.0),
)
METRICS.add(
    "exact_match",
    f"{_ARITHMETIC}:exact_match",
    about="Fraction of the generated texts that equal the references.",
    of=("texts",),
    range=(0.0, 1.0),
)
METRICS.add(
    "rougeL",
    f"{_ARITHMETIC}:rouge_l",
    about="F-measure of the longest common subsequence of words, in any script.",
    of=("texts",),
    range=(0.0, 1.0),
)
METRICS.add(
    "bleu",
    f"{_TEXTS}:bleu",
    about="BLEU of all generated texts, by sacrebleu.",
    of=("texts",),
    range=(0.0, 1.0),
)
METRICS.add(
    "chrf",
    f"{_TEXTS}:chrf",
    about="chrF of all generated texts, the F-score of character n-grams, by sacrebleu.",
    of=("texts",),
    range=(0.0, 1.0),
)
METRICS.add(
    "squad_f1",
    f"{_TEXTS}:squad_f1",
    about="F1 of the words of each answer, as SQuAD's.",
    of=("answers",),
    range=(0.0, 1.0),
)
METRICS.add(
    "squad_exact_match",
    f"{_TEXTS}:squad_exact_match",
    about="Fraction of the answers that equal a reference, as SQuAD's.",
    of=("answers",),
    range=(0.0, 1.0),
)
METRICS.add(
    "mrr",
    f"{_TEXTS}:mean_reciprocal_rank",
    about="Mean reciprocal rank of the nearest positive among the texts of the split.",
    of=("vectors",),
    range=(0.0, 1.0),
)
METRICS.add(
    "recall_at_1",
    f"{_TEXTS}:recall_at_1",
    about="Fraction of the anchors whose nearest text is a positive.",
    of=("vectors",),
    range=(0.0, 1.0),
)
METRICS.add(
    "recall_at_10",
    f"{_TEXTS}:recall_at_10",
    about="Fraction of the anchors with a positive among the 10 nearest texts.",
    of=("vectors",),
    range=(0.0, 1.0),
)
METRICS.add(
    "entity_f1",
    f"{_ENTITIES}:entity_f1",
    about="Harmonic mean of entity_precision and entity_recall.",
    of=("tags",),
    range=(0.0, 1.0),
    entities=True,
)
METRICS.add(
    "entity_precision",
    f"{_ENTITIES}:entity_precision",
    about="Fraction of the predicted entities that are right, with type and borders.",
    of=("tags",),
    range=(0.0, 1.0),
    entities=True,
)
METRICS.add(
    "entity_recall",
    f"{_ENTITIES}:entity_recall",
    about="Fraction of the entities that are found, with type and borders.",
    of=("tags",),
    range=(0.0, 1.0),
    entities=True,
)
METRICS.add(
    "tag_accuracy",
    f"{_ENTITIES}:tag_accuracy",
    about="Fraction of the words with the right tag.",
    of=("tags",),
    range=(0.0, 1.0),
)
METRICS.add(
    "mse",
    f"{_VALUES}:mse",
    about="Mean squared error; lower is better.",
    of=("values",),
    range=(0.0, math.inf),
    greater_is_better=False,
)
METRICS.add(
    "mae",
    f"{_VALUES}:mae",
    about="Mean absolute error; lower is better.",
    of=("values",),
    range=(0.0, math.inf),
    greater_is_better=False,
)
METRICS.add(
    "pearson",
    f"{_VALUES}:pearson",
    about="Pearson's correlation of predicted and true values, from -1 to 1.",
    of=("values",),
    range=(-1.0, 1.0),
)
METRICS.add(
    "spearman",
    f"{_VALUES}:spearman",
    about="Correlation of the ranks of predicted and true values, from -1 to 1.",
    of=("values",),
    range=(-1.0, 1.0),
)
METRICS.add(
    "micro_f1",
    f"{_SETS}:micro_f1",
    about="F1 of all pairs of an example and a label together.",
    of=("label_sets",),
    range=(0.0, 1.0),
)
METRICS.add(
    "macro_f1",
    f"{_SETS}:macro_f1",
    about="F1 of each label, averaged with equal weights.",
    of=("label_sets",),
    range=(0.0, 1.0),
)
METRICS.add(
    "average_precision",
    f"{_SETS}:average_precision",
    about="Area under the curve of precision and recall of each label, averaged (macro).",
    of=("label_scores",),
    range=(0.0, 1.0),
)
METRICS.add(
    "reward_accuracy",
    "fedmerge_peft.tasks.metrics:reward_accuracy",
    about="Fraction of the pairs whose chosen completion has the higher reward.",
    of=("rewards",),
    range=(0.0, 1.0),
)
METRICS.add(
    "reward_margin",
    "fedmerge_peft.tasks.metrics:reward_margin",
    about="Mean difference of the rewards of the chosen and the rejected completions.",
    of=("rewards",),
    range=(-math.inf, math.inf),
)
