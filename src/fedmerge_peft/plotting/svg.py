"""Draw figures as SVG for the page, whose style sheet sets the colors for light and dark mode.

All figures are ``WIDTH`` units wide, about a phone's width in CSS pixels, so that text stays
legible when the page scales them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import NDArray

from fedmerge_peft.plotting.specs import Bars, Drawing, Heat, Line, Lines, Strip
from fedmerge_peft.util.text import printable

WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 104, 10, 40
"""Margins for y tick labels, line names, padding, and x tick labels with the axis title."""
_HEIGHT = 250
_LINE = 13
"""Height of a line of text."""
_LEVELS = 20
"""Shades of a heat map."""
_ROW_HEIGHTS = (3.2, 16.0)
"""Least and greatest height of a heat map's row."""
_MAX_HEIGHT = 640
_MAX_CHARACTERS = 17
"""Limit on characters of a name."""
MAX_ROWS = int(_MAX_HEIGHT / _ROW_HEIGHTS[0])
"""Rows of a heat map; with more, adjacent rows are averaged."""
MAX_COLUMNS = 80
"""The same for columns."""


def draw(drawing: Drawing) -> Markup:
    """Return an ``svg`` element, or an empty string if there is nothing to draw."""
    match drawing:
        case Lines():
            return lines(
                drawing.series,
                x=drawing.x,
                y=drawing.y,
                floor=drawing.floor,
                ceiling=drawing.ceiling,
            )
        case Heat():
            return heat(
                drawing.values,
                rows=drawing.rows,
                columns=drawing.columns,
                x=drawing.x,
                label=drawing.label,
                top=drawing.top,
            )
        case Strip():
            return strip(drawing.panels, label=f"{drawing.label}: {drawing.y} by {drawing.x}")
        case Bars():
            return bars(drawing.names, drawing.values, unit=drawing.unit, label=drawing.label)


def lines(
    series: Sequence[Line],
    *,
    x: str,
    y: str,
    floor: float | None = None,
    ceiling: float | None = None,
) -> Markup:
    """Draw lines with their names at their ends.

    Args:
        series: The lines; points that are not finite are omitted.
        x: Title of the x axis, with its unit.
        y: Title of the y axis, with its unit, for screen readers.
        floor: Value that the y axis must include at its lower end.
        ceiling: Upper limit of the y axis.
    """
    y_values = [
        value
        for line in series
        for part in (line.y, line.low or [], line.high or [])
        for value in part
        if math.isfinite(value)
    ]
    x_values = [value for line in series for value in line.x]
    if not y_values:
        return Markup("")
    lowest = min([*y_values, *([] if floor is None else [floor])])
    ticks = _ticks(lowest, max(y_values), ceiling)
    right, bottom = WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    across = _scale(min(x_values), max(x_values), _LEFT, right)
    up = _scale(ticks[0], ticks[-1], bottom, _TOP)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        + _text("num", _LEFT - 6, f"{up(tick) + 4:.1f}", _number(tick), anchor="end")
        for tick in ticks
    ]
    for tick in _whole(min(x_values), max(x_values)):
        parts.append(_text("num", f"{across(tick):.1f}", bottom + 16, str(tick), anchor="middle"))
    parts.append(_text("axis", (_LEFT + right) / 2, _HEIGHT - 6, x, anchor="middle"))
    ends: list[tuple[float, Line]] = []
    for line in series:
        if line.low is not None and line.high is not None:
            finite = [
                (a, low, high)
                for a, low, high in zip(line.x, line.low, line.high, strict=True)
                if math.isfinite(low + high)
            ]
            upper = [(a, high) for a, _, high in finite]
            lower = [(a, low) for a, low, _ in reversed(finite)]
            outline = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in upper + lower)
            parts.append(f'<polygon class="band s{line.style}" points="{outline}"/>')
        points = [
            (across(a), up(b)) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(b)
        ]
        if not points:
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="line s{line.style}" points="{path}"/>')
        parts += [
            f'<circle class="dot s{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
            for a, b in points[:: max(1, len(points) // 12)]
        ]
        ends.append((points[-1][1], line))
    for height, line in _separated(ends):
        parts.append(
            f'<line class="line s{line.style}" x1="{right + 6}" x2="{right + 22}" '
            f'y1="{height:.1f}" y2="{height:.1f}"/>'
            f'<text x="{right + 26}" y="{height + 4:.1f}">{escape(_short(line.name, 13))}</text>'
        )
    return _svg(
        parts,
        _HEIGHT,
        f"{y} by {x}: "
        + "; ".join(f"{line.name} ends at {_number(line.y[-1])}" for line in series if len(line.y)),
    )


def heat(
    values: NDArray[Any],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    x: str,
    label: str,
    top: float = 1.0,
    max_rows: int = MAX_ROWS,
) -> Markup:
    """Draw a heat map ``(rows, columns)`` of values from 0 to ``top``, with a color scale.

    Args:
        values: The values; 0 is blank.
        rows: Names of the rows; those that fit are written.
        columns: Names of the columns.
        x: Title of the columns.
        label: Meaning of the values, with their unit.
        top: Value of the strongest color.
        max_rows: Limit on rows; beyond it, adjacent rows are averaged.
    """
    values, rows = binned(values, rows, max_rows)
    across, columns = binned(values.T, columns, MAX_COLUMNS)
    values = across.T
    tall, wide = values.shape
    height = min(max(_MAX_HEIGHT / max(tall, 1), _ROW_HEIGHTS[0]), _ROW_HEIGHTS[1])
    left = 16 + 6.6 * max((len(_short(name)) for name in rows), default=0)
    cell = min((WIDTH - left - 8) / max(wide, 1), 46.0)
    bottom = _TOP + tall * height
    parts = [_rect(left, wide * cell, tall * height)]
    parts.append(_cells(values / top if top else values, left, _TOP, cell, height))
    step = math.ceil(10 / height)
    for number in range(0, tall, step):
        y = _TOP + (number + 0.5) * height + 3.5
        parts.append(
            _text("num", f"{left - 5:.1f}", f"{y:.1f}", _short(rows[number]), anchor="end")
        )
    longest = max((len(name) for name in columns), default=0)
    turned = longest * 6.2 > cell
    label_height = 6.4 * min(longest, _MAX_CHARACTERS) + 8 if turned else 16
    for number in range(0, wide, math.ceil((11 if turned else 6.2 * longest + 4) / cell)):
        name, middle = escape(_short(columns[number])), left + (number + 0.5) * cell
        rotation = f'transform="translate({middle + 3.5:.1f} {bottom + 5:.1f}) rotate(-90)"'
        position = (
            f'{rotation} text-anchor="end"'
            if turned
            else f'x="{middle:.1f}" y="{bottom + 13:.1f}" text-anchor="middle"'
        )
        parts.append(f'<text class="num" {position}>{name}</text>')
    axis = bottom + label_height + 14
    parts.append(f'<text class="axis" x="{left:.1f}" y="{axis:.1f}">{escape(x)}</text>')
    scale = "".join(
        f'<rect class="ink" x="{4 + 90 * level / _LEVELS:.1f}" y="{axis + 10:.1f}" '
        f'width="{90 / _LEVELS + 0.1:.1f}" height="9" fill-opacity="{level / _LEVELS:.2f}"/>'
        for level in range(1, _LEVELS + 1)
    )
    parts.append(f'<rect class="field" x="4" y="{axis + 10:.1f}" width="94.5" height="9"/>{scale}')
    parts.append(
        f'<text class="num" x="106" y="{axis + 18:.1f}">0 to {_number(top)}: {escape(label)}</text>'
    )
    return _svg(parts, axis + 26, f"{label}, {tall} rows by {wide} columns")


def strip(panels: Sequence[tuple[str, NDArray[Any]]], *, label: str) -> Markup:
    """Draw adjacent heat maps ``(rows, columns)`` of values from 0 to 1, with titles below."""
    gap = 10
    wide = (WIDTH - 8 - gap * (len(panels) - 1)) / max(len(panels), 1)
    tall = min(220.0, max(60.0, len(panels[0][1]) * _ROW_HEIGHTS[1])) if panels else 0.0
    parts = []
    for number, (title, values) in enumerate(panels):
        values, _ = binned(values, [""] * len(values), MAX_ROWS)
        values = binned(values.T, [""] * values.shape[1], MAX_COLUMNS)[0].T
        left = 4 + number * (wide + gap)
        parts.append(_rect(left, wide, tall))
        parts.append(_cells(values, left, _TOP, wide / values.shape[1], tall / len(values)))
        x, y = f"{left + wide / 2:.1f}", f"{_TOP + tall + 15:.1f}"
        parts.append(_text("num", x, y, title, anchor="middle"))
    return _svg(parts, _TOP + tall + 24, label)


def bars(names: Sequence[str], values: Sequence[float], *, unit: str, label: str) -> Markup:
    """Draw one named bar per value."""
    left = 14 + 6.6 * max((len(_short(name)) for name in names), default=0)
    top = max([*(value for value in values if math.isfinite(value)), 0.0]) or 1.0
    room = WIDTH - left - 90
    parts = []
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        y = _TOP + 24 * number
        wide = room * value / top if math.isfinite(value) else 0.0
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 13}" text-anchor="end">{escape(_short(name))}</text>'
            f'<rect class="bar" x="{left:.1f}" y="{y}" width="{max(wide, 1):.1f}" height="17" '
            'rx="2"/>'
            f'<text class="num" x="{left + wide + 6:.1f}" y="{y + 13}">'
            f"{_number(value)} {escape(unit)}</text>"
        )
    return _svg(parts, _TOP + 24 * len(names) + 4, label)


def binned(
    values: NDArray[Any], names: Sequence[str], limit: int
) -> tuple[NDArray[Any], list[str]]:
    """Average adjacent rows of ``(rows, columns)`` if there are more than ``limit``.

    Returns:
        The rows, and the name of the first row of each average.
    """
    if len(values) <= limit:
        return values, list(names)
    edges = np.linspace(0, len(values), limit + 1).astype(int)
    means = np.stack([values[start:stop].mean(axis=0) for start, stop in pairwise(edges)])
    return means, [names[start] for start in edges[:-1]]


def _cells(values: NDArray[Any], left: float, top: float, wide: float, tall: float) -> str:
    """Draw cells as one path per shade, a tenth of the size of one rectangle per cell."""
    shades = np.nan_to_num(
        np.clip(np.ceil(np.nan_to_num(values) * _LEVELS - 1e-9), 0, _LEVELS)
    ).astype(int)
    parts = []
    for shade in range(1, _LEVELS + 1):
        cells = np.argwhere(shades == shade)
        if len(cells):
            size = f"h{wide:.1f}v{tall:.1f}h-{wide:.1f}z"
            path = "".join(
                f"M{left + column * wide:.1f} {top + row * tall:.1f}{size}" for row, column in cells
            )
            parts.append(f'<path class="ink" fill-opacity="{shade / _LEVELS:.2f}" d="{path}"/>')
    return "".join(parts)


def _text(kind: str, x: float | str, y: float | str, text: str, *, anchor: str) -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'


def _rect(left: float, wide: float, tall: float) -> str:
    """Draw the background of a heat map."""
    size = f'width="{wide:.1f}" height="{tall:.1f}"'
    return f'<rect class="field" x="{left:.1f}" y="{_TOP}" {size}/>'


def _svg(parts: Sequence[str], height: float, label: str) -> Markup:
    attributes = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}"'
    markup = f"<svg {attributes}>{''.join(parts)}</svg>"
    return Markup("\n".join(map(printable, markup.split("\n"))))  # noqa: S704 (escaped)


def _scale(low: float, high: float, start: float, stop: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _ticks(low: float, high: float, ceiling: float | None = None) -> list[float]:
    """Return four to seven round numbers that enclose a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * number for number in range(first, max(last, first + 1) + 1)]
    return [tick for tick in ticks if ceiling is None or tick <= ceiling + 1e-9]


def _whole(low: float, high: float) -> list[int]:
    """Return up to seven whole numbers within a range."""
    step = max(
        1,
        next(
            size
            for size in (10**power * factor for power in range(9) for factor in (1, 2, 5))
            if size >= (high - low) / 6
        ),
    )
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def _separated(ends: Sequence[tuple[float, Line]]) -> list[tuple[float, Line]]:
    """Move the heights of line names apart so that they do not overlap."""
    ordered = sorted(ends, key=lambda end: end[0])
    heights = [height for height, _ in ordered]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + _LINE)
    excess = max(0.0, heights[-1] - (_HEIGHT - _BOTTOM)) if heights else 0.0
    return [(height - excess, line) for height, (_, line) in zip(heights, ordered, strict=True)]


def _short(name: str, limit: int = _MAX_CHARACTERS) -> str:
    """Shorten a name in the middle: its last characters distinguish the clients of a group."""
    return name if len(name) <= limit else f"{name[: limit - 6]}…{name[-5:]}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:,.0f}"
