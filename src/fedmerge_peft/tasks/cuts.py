"""Counts of the examples to warn of, such as truncated or empty ones."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fedmerge_peft.tasks.base import Examples

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)


def count_cuts(
    examples: Examples, parts: Mapping[str, NDArray[np.int64]], name: str = "examples"
) -> list[str]:
    """Count the examples to which each predicate of ``Examples.cuts`` applies.

    Return one line for each predicate that applies to an example in use, such as ``3 of 90 examples
    are longer than 32 tokens and were truncated``. If several parts have examples, the line also
    has the count of each part.

    Args:
        examples: Encoded examples.
        parts: Indices of the examples in use, by part, such as ``training``. An example of several
            clients counts once.
        name: Plural noun for the examples.
    """
    held = {part: set(rows.tolist()) for part, rows in parts.items() if len(rows)}
    total = len(set().union(*held.values()))
    lines = []
    for predicate, rows in examples.cuts.items():
        counts = {part: len(own.intersection(rows)) for part, own in held.items()}
        if not (cut := len(set().union(*held.values()).intersection(rows))):
            continue
        shares = ", ".join(f"{counts[part]:,} of {len(own):,} {part}" for part, own in held.items())
        by_part = f" ({shares})" if len(held) > 1 else ""
        lines.append(f"{cut:,} of {total:,} {name} {predicate}{by_part}")
    return lines


def warn_of_cuts(
    examples: Examples, parts: Mapping[str, NDArray[np.int64]], name: str = "examples"
) -> None:
    """Log each line of ``count_cuts`` as a warning."""
    for line in count_cuts(examples, parts, name):
        logger.warning("%s", line)
