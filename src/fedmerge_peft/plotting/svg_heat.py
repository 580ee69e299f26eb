"""Heat maps as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from fedmerge_peft.plotting.specs import Heat, Strip
from fedmerge_peft.plotting.svg_marks import (
    LINE,
    WIDTH,
    label,
    number,
    short,
    svg,
    text,
    text_width,
    wrapped,
)

_LEVELS = 20
"""Number of shades of a heat map."""
_ROW_HEIGHTS = (3.2, 16.0)
"""Least and greatest height of a heat map's row."""
_MAX_HEIGHT = 640
"""Height limit of a heat map."""
MAX_ROWS = int(_MAX_HEIGHT / _ROW_HEIGHTS[0])
"""Limit on the rows of a heat map. With more, adjacent rows are averaged."""
MAX_COLUMNS = 80
"""Limit on the columns of a heat map. With more, adjacent columns are averaged."""
_TOP = 8
"""Margin above a heat map."""
_MAX_CELL = 46.0
"""Greatest width of a cell."""
_GROUPS = 0.24
"""Limit on the fraction of the width that the names of groups take."""
_CELLS = 0.4
"""Fraction of the width that is reserved for the cells, if they need it."""


def heat(drawing: Heat) -> Markup:
    """Draw a heat map with a color scale. Names of groups are to the right of their rows."""
    values, rows = binned(drawing.values, drawing.rows, MAX_ROWS)
    across, columns = binned(values.T, drawing.columns or [""] * values.shape[1], MAX_COLUMNS)
    values = across.T
    tall, wide = values.shape
    height = min(max(_MAX_HEIGHT / max(tall, 1), _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
    groups = binned_groups(drawing.groups, tall)
    group_room = min(
        max((text_width(group, small=True) for group in groups), default=-14.0) + 14,
        _GROUPS * WIDTH,
    )
    needed = min(wide * 24.0, _CELLS * WIDTH)
    room = WIDTH - group_room - needed
    widest = max((text_width(name, small=True) for name in rows), default=0.0)
    left = 10 + min(widest, room - 10)
    cell = min((WIDTH - left - group_room) / max(wide, 1), _MAX_CELL)
    bottom = _TOP + tall * height
    parts = [_field(left, wide * cell, tall * height)]
    parts.append(_cells(values / drawing.top if drawing.top else values, left, cell, height))
    for index in range(0, tall, math.ceil(11 / height)):
        y = _TOP + (index + 0.5) * height + 3.5
        parts.append(
            text("num", left - 5, y, short(rows[index], left - 8, small=True), anchor="end")
        )
    parts += _brackets(groups, left, wide * cell, height)
    label_height = 4.0
    if drawing.columns:
        labels, label_height = _column_names(columns, left, cell, bottom)
        parts += labels
    axis = bottom + label_height + 14
    half = text_width(drawing.x)
    parts.append(text("axis", max(min(left, WIDTH - half), 0), axis, drawing.x))
    parts += _color_scale(drawing.top, drawing.label, axis + 10)
    return svg(parts, axis + 26, f"{drawing.label}, {tall} rows by {wide} columns")


def strip(drawing: Strip) -> Markup:
    """Draw adjacent heat maps ``(rows, columns)`` of values from 0 to 1, with titles below."""
    panels, gap = drawing.panels, 10
    wide = (WIDTH - gap * (len(panels) - 1)) / max(len(panels), 1)
    tall = min(220.0, max(60.0, len(panels[0][1]) * _ROW_HEIGHTS[1])) if panels else 0.0
    parts = []
    for index, (title, values) in enumerate(panels):
        values, _ = binned(values, [""] * len(values), MAX_ROWS)
        values = binned(values.T, [""] * values.shape[1], MAX_COLUMNS)[0].T
        left = index * (wide + gap)
        parts.append(_field(left, wide, tall))
        parts.append(_cells(values, left, wide / values.shape[1], tall / len(values)))
        parts.append(text("num", left + wide / 2, _TOP + tall + 15, title, anchor="middle"))
    parts += _color_scale(1.0, drawing.label, _TOP + tall + 26)
    return svg(parts, _TOP + tall + 42, f"{drawing.label}: {drawing.y} by {drawing.x}")


def binned(
    values: NDArray[Any], names: Sequence[str], limit: int
) -> tuple[NDArray[Any], list[str]]:
    """Average adjacent rows of ``values`` ``(rows, columns)`` if there are more than ``limit``.

    Args:
        values: One row per name.
        names: Names of the rows.
        limit: Limit on the rows of the result.

    Returns:
        At most ``limit`` rows, and for each the name of the first row that it averages.
    """
    if len(values) <= limit:
        return values, list(names)
    edges = np.linspace(0, len(values), limit + 1).astype(int)
    means = np.stack([values[start:stop].mean(axis=0) for start, stop in pairwise(edges)])
    return means, [names[start] for start in edges[:-1]]


def binned_groups(groups: Sequence[str], limit: int) -> list[str]:
    """Return one group per row of ``binned``: the group of the first row that it averages."""
    if len(groups) <= limit:
        return list(groups)
    return [groups[start] for start in np.linspace(0, len(groups), limit + 1).astype(int)[:-1]]


def _brackets(groups: Sequence[str], left: float, wide: float, height: float) -> list[str]:
    """Draw a bracket and a name beside each group's rows, and lines between groups.

    A name that would overlap the name above it is omitted.
    """
    parts, start, free = [], 0, -math.inf
    x = left + wide + 4
    for name, members in groupby(groups):
        size = len(list(members))
        top, bottom = _TOP + start * height, _TOP + (start + size) * height
        if start:
            parts.append(
                f'<line class="gap" x1="{left:.1f}" x2="{left + wide:.1f}" '
                f'y1="{top:.1f}" y2="{top:.1f}"/>'
            )
        if name:
            parts.append(
                f'<path class="bracket" d="M{x:.1f} {top + 1.5:.1f}h3V{bottom - 1.5:.1f}h-3"/>'
            )
        y = (top + bottom) / 2 + 4
        if name and y - free >= 11:
            tall = bottom - top >= 2 * LINE
            lines = wrapped(name, WIDTH - x - 7, small=True) if tall else []
            lines = lines or [short(name, WIDTH - x - 7, small=True)]
            parts.append(label(x + 7, y - 4, lines, "num", anchor="start"))
            free = y
        start += size
    return parts


def _column_names(
    columns: Sequence[str], left: float, cell: float, bottom: float
) -> tuple[list[str], float]:
    """Return the parts that draw column names below a heat map, and their height.

    The names are rotated if one is wider than a cell. Names that would overlap are omitted.
    """
    names = [short(name, 110, small=True) for name in columns]
    longest = max((text_width(name, small=True) for name in names), default=0.0)
    turned = longest > cell
    parts = []
    for index in range(0, len(names), math.ceil((11 if turned else longest + 4) / cell)):
        middle = left + (index + 0.5) * cell
        if not turned:
            parts.append(text("num", middle, bottom + 13, names[index], anchor="middle"))
            continue
        turn = f'transform="translate({middle + 3.5:.1f} {bottom + 5:.1f}) rotate(-90)"'
        label = text("num", 0, 0, names[index], anchor="end")
        parts.append(f"<g {turn}>{label}</g>")
    return parts, longest + 8 if turned else 16


def _color_scale(top: float, label: str, y: float) -> list[str]:
    step = 90 / _LEVELS
    shades = "".join(
        f'<rect class="ink" x="{step * level:.1f}" y="{y:.1f}" width="{step + 0.1:.1f}" '
        f'height="9" fill-opacity="{level / _LEVELS:.2f}"/>'
        for level in range(1, _LEVELS + 1)
    )
    return [
        f'<rect class="field" x="0" y="{y:.1f}" width="94.5" height="9"/>{shades}',
        text("num", 102, y + 8, f"0 to {number(top)}: {label}"),
    ]


def _cells(values: NDArray[Any], left: float, wide: float, tall: float) -> str:
    """Draw one path per shade; one rectangle per cell would take about three times the bytes."""
    shades = np.nan_to_num(
        np.clip(np.ceil(np.nan_to_num(values) * _LEVELS - 1e-9), 0, _LEVELS)
    ).astype(int)
    parts = []
    for shade in range(1, _LEVELS + 1):
        cells = np.argwhere(shades == shade)
        if len(cells):
            size = f"h{wide:.1f}v{tall:.1f}h-{wide:.1f}z"
            path = "".join(
                f"M{left + column * wide:.1f} {_TOP + row * tall:.1f}{size}"
                for row, column in cells
            )
            parts.append(f'<path class="ink" fill-opacity="{shade / _LEVELS:.2f}" d="{path}"/>')
    return "".join(parts)


def _field(left: float, wide: float, tall: float) -> str:
    """Draw the background of a heat map."""
    size = f'width="{wide:.1f}" height="{tall:.1f}"'
    return f'<rect class="field" x="{left:.1f}" y="{_TOP}" {size}/>'
