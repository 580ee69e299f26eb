"""Check of the regular expressions in recipes. Expressions that may take too long are refused."""

from __future__ import annotations

import re
import warnings
from re import _constants as op  # type: ignore[attr-defined]
from re import _parser as parser  # type: ignore[attr-defined]
from typing import Any

_LENGTH = 64
"""Length of a module's name that the estimate assumes, in characters."""

_MOST = float((_LENGTH + 1) ** 4)
"""Maximum number of ways to match: as many as for an expression with four repetitions ``.*``."""


def pattern_fault(pattern: str) -> str | None:
    """Return the reason why a recipe cannot use a regular expression; None if it can."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a FutureWarning about nested sets
            ways = _ways(parser.parse(pattern))
    except (re.error, FutureWarning, RecursionError, OverflowError) as error:
        return f"{pattern!r} is not a regular expression: {error or type(error).__name__}"
    if ways > _MOST:
        return (
            f"{pattern!r} may take forever, because its repetitions can divide a name in too many "
            "ways; use at most four repetitions such as .* or \\d+, and repeat neither a "
            "repetition nor alternatives such as (ab|cd)"
        )
    return None


def _ways(pattern: Any) -> float:
    """Bound the number of ways in which an expression matches a name of ``_LENGTH`` characters.

    In a sequence, the ways of the parts are multiplied; for alternatives, they are added. Up to k
    repetitions of an expression with w > 1 ways count as wᵏ ways; with w = 1, there is one way for
    each number of repetitions. The ways of an assertion are not a factor, because the engine does
    not backtrack into an assertion that has matched. Instead, they replace the product so far if
    they are larger.
    """
    total = 1.0
    for kind, value in pattern:
        if kind in (op.MAX_REPEAT, op.MIN_REPEAT, op.POSSESSIVE_REPEAT):
            least, most, repeated = value
            total *= _repeated(_ways(repeated), least, min(most, _LENGTH))
        elif kind is op.BRANCH:
            total *= sum(_ways(choice) for choice in value[1])
        elif kind is op.SUBPATTERN:
            total *= _ways(value[-1])
        elif kind is op.ATOMIC_GROUP:
            total *= _ways(value)
        elif kind in (op.ASSERT, op.ASSERT_NOT):
            total = max(total, _ways(value[1]))
        elif kind is op.GROUPREF_EXISTS:
            total *= sum(_ways(choice) for choice in value[1:] if choice is not None)
    return total


def _repeated(ways: float, least: int, most: int) -> float:
    """Bound the number of ways to match ``least`` to ``most`` repetitions of an expression."""
    if ways == 1 or most <= 1:
        return max(1.0, (most - least + 1) if ways == 1 else ways + (least == 0))
    return min(ways, _MOST) ** min(most, 40)
