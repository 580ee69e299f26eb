"""Colors and dashes of all figures; the colors are distinct for color-blind readers."""

from __future__ import annotations

COLORS = ("#0072b2", "#d55e00", "#007a5a", "#a8457f", "#6b5800", "#444444")
"""Line colors on a light background."""
DARK_COLORS = ("#56b4e9", "#ff9447", "#2fc69a", "#e79ac6", "#f0e442", "#cccccc")
"""The same on a dark background."""
DASHES: tuple[tuple[float, ...], ...] = ((), (3, 2), (1, 2), (4, 1.5, 1, 1.5), (2, 1.5), ())
"""Lengths of dashes and gaps, in line widths; empty for a solid line."""
COLORMAP = "Blues"
"""Matplotlib's colormap of heat maps."""
