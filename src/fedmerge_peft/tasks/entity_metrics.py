"""Metrics of tag sequences, computed by seqeval like CoNLL's evaluation script.

An entity is a run of consecutive words whose tags have one type. In IOB2, B-X begins an entity. I-X
continues an entity of type X, or begins one if no such entity directly precedes it. In BIOES, E-X
ends an entity, and S-X is an entity of one word. An entity is right if its type and both borders
are right. F1, precision and recall are ``nan`` if there are neither expected nor predicted
entities.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

Tags = Sequence[Sequence[str]]
"""Tags of the words of each text."""

_TAG = re.compile(r"O|[BIES]-.+")


def is_entity_tag(tag: str) -> bool:
    """Return True for a tag of IOB2 or BIOES, such as O or B-PER."""
    return _TAG.fullmatch(tag) is not None


def continues_nothing(tags: Sequence[str]) -> bool:
    """Return True if any I-X or E-X does not follow B-X or I-X."""
    begun = ("O", *tags)
    return any(
        tag[:2] in ("I-", "E-") and before not in (f"B-{tag[2:]}", f"I-{tag[2:]}")
        for before, tag in zip(begun, tags, strict=False)
    )


def entity_f1(predicted: Tags, expected: Tags) -> float:
    """Compute F1 of the entities, over all types together (micro)."""
    from seqeval.metrics import f1_score

    return _of_entities(f1_score, predicted, expected)


def entity_precision(predicted: Tags, expected: Tags) -> float:
    """Compute the fraction of the predicted entities that are expected."""
    from seqeval.metrics import precision_score

    return _of_entities(precision_score, predicted, expected)


def entity_recall(predicted: Tags, expected: Tags) -> float:
    """Compute the fraction of the expected entities that are predicted."""
    from seqeval.metrics import recall_score

    return _of_entities(recall_score, predicted, expected)


def tag_accuracy(predicted: Tags, expected: Tags) -> float:
    """Compute the fraction of the words with the right tag."""
    from seqeval.metrics import accuracy_score

    return float(accuracy_score(_lists(expected), _lists(predicted)))


def _of_entities(score: Any, predicted: Tags, expected: Tags) -> float:
    if all(tag == "O" for tags in (*predicted, *expected) for tag in tags):
        return math.nan
    return float(score(_lists(expected), _lists(predicted), zero_division=0))


def _lists(tags: Tags) -> list[list[str]]:
    return [list(sequence) for sequence in tags]
