"""Colors and dashes of all figures; the colors are distinct for color-blind readers."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

COLORS = ("#0072b2", "#d55e00", "#007a5a", "#a8457f", "#6b5800", "#444444")
"""Line colors on a light background."""
DARK_COLORS = ("#56b4e9", "#ff9447", "#2fc69a", "#e79ac6", "#f0e442", "#cccccc")
"""Line colors on a dark background."""
DASHES: tuple[tuple[float, ...], ...] = ((), (3, 2), (1, 2), (4, 1.5, 1, 1.5), (2, 1.5), ())
"""Lengths of dashes and gaps, in line widths; empty for a solid line."""
COLORMAP = "Blues"
"""Matplotlib's colormap of heat maps."""

_FIXED = ("fedmerge", "fedavg", "local")
"""Strategies that have the first styles in every figure."""


def method_styles(strategies: Mapping[str, str]) -> dict[str, int]:
    """Return a style for each method, an index into ``COLORS`` and ``DASHES``.

    The first method with the strategy ``fedmerge`` has the same style in all figures, as have the
    first with ``fedavg`` and the first with ``local``. The other methods get the remaining styles
    in order, then all styles again.

    Args:
        strategies: Strategy of each method by the method's name.
    """
    styles: dict[str, int] = {}
    for number, strategy in enumerate(_FIXED):
        if first := next((name for name, kind in strategies.items() if kind == strategy), None):
            styles[first] = number
    free = count(len(_FIXED))
    rest = (name for name in strategies if name not in styles)
    return styles | {name: next(free) % len(COLORS) for name in rest}
