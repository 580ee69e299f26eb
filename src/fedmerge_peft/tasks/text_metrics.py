"""Metrics of texts, from 0 to 1: BLEU and chrF, exact match and F1 of SQuAD, and retrieval."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Row = tuple[Sequence[int], Sequence[Any]]
"""Ids and unit vectors of a row's texts: anchor, positive and, if there is one, negative. Equal
texts have the same id."""


def bleu(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the BLEU of a corpus (Papineni 2002; tokenizer 13a of sacrebleu, Post 2018)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score([*generated], [[*references]]).score) / 100


def chrf(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the chrF of a corpus: n-grams of 1 to 6 characters, β = 2 (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score([*generated], [[*references]]).score) / 100


def squad_exact_match(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute the fraction of predictions that equal one of their answers after normalization.

    Normalization leaves only words in lower case, without punctuation and articles. Answers without
    such words are ignored if there are other answers (SQuAD 2, Rajpurkar 2018).
    """
    return _best_of(predicted, answers, lambda text, answer: float(text == answer))


def squad_f1(predicted: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute the mean word-level F1 of predictions, each against its best answer.

    If no answer has words, F1 is 1 for a prediction without words, and 0 for any other prediction
    (SQuAD 2, Rajpurkar 2018).
    """
    return _best_of(predicted, answers, _f1)


def _best_of(
    predicted: Sequence[str],
    answers: Sequence[Sequence[str]],
    compare: Callable[[list[str], list[str]], float],
) -> float:
    scores = []
    for text, references in zip(predicted, answers, strict=True):
        wanted = [words for reference in references if (words := _normalized(reference))] or [[]]
        scores.append(max(compare(_normalized(text), words) for words in wanted))
    return sum(scores) / len(scores)


def _normalized(text: str) -> list[str]:
    """Return a text's words in lower case, without ASCII punctuation and English articles."""
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(predicted: list[str], wanted: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(wanted)).values())
    if not predicted or not wanted or not common:
        return float(predicted == wanted)
    precision, recall = common / len(predicted), common / len(wanted)
    return 2 * precision * recall / (precision + recall)


def recall_at_1(anchors: Sequence[Any], rows: Sequence[Row]) -> float:
    """Compute the fraction of anchors whose nearest text is one of their positives."""
    return float(np.mean(_ranks(anchors, rows) <= 1))


def recall_at_10(anchors: Sequence[Any], rows: Sequence[Row]) -> float:
    """Compute the fraction of anchors with one of their positives among the nearest 10 texts."""
    return float(np.mean(_ranks(anchors, rows) <= 10))


def mean_reciprocal_rank(anchors: Sequence[Any], rows: Sequence[Row]) -> float:
    """Compute the mean of 1 / rank of the nearest positive among all texts."""
    return float(np.mean(1 / _ranks(anchors, rows)))


def _ranks(anchors: Sequence[Any], rows: Sequence[Row]) -> NDArray[np.int64]:
    """Return the rank of each anchor's nearest positive, from 1.

    The candidates are the distinct positives and negatives of all rows, without the anchor's own
    text. Positives of other rows with the same anchor are its positives too. A positive ranks after
    other texts that are equally near.

    Args:
        anchors: Unit vector of each row's anchor.
        rows: Ids and unit vectors of each row's texts.
    """
    pool: dict[int, Any] = {}
    positives: dict[int, set[int]] = {}
    for numbers, vectors in rows:
        positives.setdefault(numbers[0], set()).add(numbers[1])
        pool |= dict(zip(numbers[1:], vectors[1:], strict=True))
    numbers_of_pool = np.array([*pool])
    similarity = np.stack(anchors) @ np.stack([*pool.values()]).T  # (anchors, candidates)
    ranks = []
    for near, (numbers, _) in zip(similarity, rows, strict=True):
        own = np.isin(numbers_of_pool, [*positives[numbers[0]]])
        others = ~own & (numbers_of_pool != numbers[0])
        ranks.append(1 + int((near[others] >= near[own].max()).sum()))
    return np.array(ranks)
