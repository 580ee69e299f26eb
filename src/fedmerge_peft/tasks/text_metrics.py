"""Metrics of texts as fractions from 0 to 1: BLEU and chrF by sacrebleu, SQuAD's, retrieval."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence


def bleu(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the BLEU of a corpus (Papineni 2002; tokenizer 13a of sacrebleu, Post 2018)."""
    from sacrebleu.metrics import BLEU

    return float(BLEU().corpus_score([*generated], [[*references]]).score) / 100


def chrf(generated: Sequence[str], references: Sequence[str]) -> float:
    """Compute the chrF of a corpus: n-grams of 6 characters, β = 2 (Popović 2015)."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score([*generated], [[*references]]).score) / 100


def squad_exact_match(found: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute the fraction of answers that equal one of the references after normalization."""
    return _best_of(found, answers, lambda text, answer: float(text == answer))


def squad_f1(found: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Compute the mean F1 of the words of answers, each with its best reference.

    An empty answer has F1 1 if the reference is empty too (SQuAD 2, Rajpurkar 2018).
    """
    return _best_of(found, answers, _f1)


def _best_of(
    found: Sequence[str],
    answers: Sequence[Sequence[str]],
    compare: Callable[[list[str], list[str]], float],
) -> float:
    scores = []
    for text, references in zip(found, answers, strict=True):
        wanted = [words for each in references if (words := _normalized(each))] or [[]]
        scores.append(max(compare(_normalized(text), words) for words in wanted))
    return sum(scores) / len(scores)


def _normalized(text: str) -> list[str]:
    """Return the words of an answer, in lower case, without punctuation and articles."""
    kept = "".join(each for each in text.lower() if each not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", kept).split()


def _f1(found: list[str], wanted: list[str]) -> float:
    common = sum((Counter(found) & Counter(wanted)).values())
    if not found or not wanted or not common:
        return float(found == wanted)
    precision, recall = common / len(found), common / len(wanted)
    return 2 * precision * recall / (precision + recall)
