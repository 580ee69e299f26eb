"""Figures as SVG text: lines with bands, heat maps, bars. Their colours are the page's, so that they follow its light and dark.

All are ``WIDTH`` units wide, which is about a phone's width in CSS pixels, so that text stays legible where a page scales them to fit.
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

WIDTH = 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 104, 10, 40
"""Margins: numbers of the y axis, names of the lines, air, numbers and title of the x axis."""
_HEIGHT = 250
_LINE = 13
"""Height of a line of text."""
_LEVELS = 20
"""Shades of a heat map."""
_ROWS = (3.2, 16.0)
"""Least and greatest height of a heat map's row."""
_TALLEST = 640
_SHORT = 17
"""Characters of a name beside a heat map."""
MOST_ROWS = int(_TALLEST / _ROWS[0])
"""Rows of a heat map; with more, neighbours share one."""
MOST_COLUMNS = 80


def draw(drawing: Drawing) -> Markup:
    """The drawing as an ``svg`` element; empty where there is nothing to draw."""
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
            return strip(drawing.pictures, label=f"{drawing.label}: {drawing.y} by {drawing.x}")
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
    """Lines with their names at their ends.

    Args:
        series: Points that are not finite are left out.
        x: Title of the x axis, with its unit.
        y: What the y axis shows, with its unit; for readers that hear the page.
        floor: Lowest value that the y axis shows in any case.
        ceiling: Highest value that the y axis goes to.
    """
    every = [
        value
        for line in series
        for part in (line.y, line.low or [], line.high or [])
        for value in part
        if math.isfinite(value)
    ]
    places = [value for line in series for value in line.x]
    if not every:
        return Markup("")
    ticks = _ticks(min([*every, *([] if floor is None else [floor])]), max(every), ceiling)
    right, bottom = WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    across = _scale(min(places), max(places), _LEFT, right)
    up = _scale(ticks[0], ticks[-1], bottom, _TOP)
    parts = [
        f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        f'<text class="num" x="{_LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        for tick in ticks
    ]
    for tick in _whole(min(places), max(places)):
        parts.append(
            f'<text class="num" x="{across(tick):.1f}" y="{bottom + 16}" text-anchor="middle">{tick}</text>'
        )
    parts.append(
        f'<text class="axis" x="{(_LEFT + right) / 2}" y="{_HEIGHT - 6}" text-anchor="middle">{escape(x)}</text>'
    )
    ends: list[tuple[float, Line]] = []
    for line in series:
        if line.low is not None and line.high is not None:
            there = [
                (a, low, high)
                for a, low, high in zip(line.x, line.low, line.high, strict=True)
                if math.isfinite(low + high)
            ]
            edge = [(a, high) for a, _, high in there] + [(a, low) for a, low, _ in reversed(there)]
            points = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in edge)
            parts.append(f'<polygon class="band s{line.style}" points="{points}"/>')
        found = [
            (across(a), up(b)) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(b)
        ]
        if not found:
            continue
        parts.append(
            f'<polyline class="line s{line.style}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in found)}"/>'
        )
        parts += [
            f'<circle class="dot s{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
            for a, b in found[:: max(1, len(found) // 12)]
        ]
        ends.append((found[-1][1], line))
    for place, line in _apart(ends):
        parts.append(
            f'<line class="line s{line.style}" x1="{right + 6}" x2="{right + 22}" y1="{place:.1f}" y2="{place:.1f}"/>'
            f'<text x="{right + 26}" y="{place + 4:.1f}">{escape(_short(line.name, 13))}</text>'
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
    most: int = MOST_ROWS,
) -> Markup:
    """A heat map ``(rows, columns)`` of values from 0 to ``top``, stronger in colour for more, with a scale.

    Args:
        values: 0 is left blank.
        rows: Names, as many of which are written as have room.
        columns: Names.
        x: Title of the columns.
        label: What the values are, with their unit.
        top: The value of the strongest colour.
        most: Rows to draw; with more of them, neighbours are averaged.
    """
    values, rows = binned(values, rows, most)
    across, columns = binned(values.T, columns, MOST_COLUMNS)
    values = across.T
    tall, wide = values.shape
    height = min(max(_TALLEST / max(tall, 1), _ROWS[0]), _ROWS[1])
    left = 16 + 6.6 * max((len(_short(name, _SHORT)) for name in rows), default=0)
    cell = min((WIDTH - left - 8) / max(wide, 1), 46.0)
    floor = _TOP + tall * height
    parts = [
        f'<rect class="field" x="{left:.1f}" y="{_TOP}" width="{wide * cell:.1f}" height="{tall * height:.1f}"/>'
    ]
    parts.append(_cells(values / top if top else values, left, _TOP, cell, height))
    step = math.ceil(10 / height)
    for number in range(0, tall, step):
        y = _TOP + (number + 0.5) * height + 3.5
        parts.append(
            f'<text class="num" x="{left - 5:.1f}" y="{y:.1f}" text-anchor="end">{escape(_short(rows[number], _SHORT))}</text>'
        )
    longest = max((len(name) for name in columns), default=0)
    turned = longest * 6.2 > cell
    room = 6.4 * min(longest, _SHORT) + 8 if turned else 16
    for number in range(0, wide, math.ceil((11 if turned else 6.2 * longest + 4) / cell)):
        name, middle = escape(_short(columns[number], _SHORT)), left + (number + 0.5) * cell
        place = f'transform="translate({middle + 3.5:.1f} {floor + 5:.1f}) rotate(-90)" text-anchor="end"'
        flat = f'x="{middle:.1f}" y="{floor + 13:.1f}" text-anchor="middle"'
        parts.append(f'<text class="num" {place if turned else flat}>{name}</text>')
    axis = floor + room + 14
    parts.append(f'<text class="axis" x="{left:.1f}" y="{axis:.1f}">{escape(x)}</text>')
    scale = "".join(
        f'<rect class="ink" x="{4 + 90 * level / _LEVELS:.1f}" y="{axis + 10:.1f}" width="{90 / _LEVELS + 0.1:.1f}" height="9" '
        f'fill-opacity="{level / _LEVELS:.2f}"/>'
        for level in range(1, _LEVELS + 1)
    )
    parts.append(f'<rect class="field" x="4" y="{axis + 10:.1f}" width="94.5" height="9"/>{scale}')
    parts.append(
        f'<text class="num" x="106" y="{axis + 18:.1f}">0 to {_number(top)}: {escape(label)}</text>'
    )
    return _svg(parts, axis + 26, f"{label}, {tall} rows by {wide} columns")


def strip(pictures: Sequence[tuple[str, NDArray[Any]]], *, label: str) -> Markup:
    """Several heat maps ``(rows, columns)`` of values from 0 to 1 beside each other, each with a title below."""
    gap = 10
    wide = (WIDTH - 8 - gap * (len(pictures) - 1)) / max(len(pictures), 1)
    tall = min(220.0, max(60.0, len(pictures[0][1]) * _ROWS[1])) if pictures else 0.0
    parts = []
    for number, (title, values) in enumerate(pictures):
        values, _ = binned(values, [""] * len(values), MOST_ROWS)
        values = binned(values.T, [""] * values.shape[1], MOST_COLUMNS)[0].T
        left = 4 + number * (wide + gap)
        parts.append(
            f'<rect class="field" x="{left:.1f}" y="{_TOP}" width="{wide:.1f}" height="{tall:.1f}"/>'
        )
        parts.append(_cells(values, left, _TOP, wide / values.shape[1], tall / len(values)))
        parts.append(
            f'<text class="num" x="{left + wide / 2:.1f}" y="{_TOP + tall + 15:.1f}" text-anchor="middle">{escape(title)}</text>'
        )
    return _svg(parts, _TOP + tall + 24, label)


def bars(names: Sequence[str], values: Sequence[float], *, unit: str, label: str) -> Markup:
    """A bar a name, with its value written beside it."""
    left = 14 + 6.6 * max((len(_short(name, _SHORT)) for name in names), default=0)
    top = max([*(value for value in values if math.isfinite(value)), 0.0]) or 1.0
    room = WIDTH - left - 90
    parts = []
    for number, (name, value) in enumerate(zip(names, values, strict=True)):
        y = _TOP + 24 * number
        wide = room * value / top if math.isfinite(value) else 0.0
        parts.append(
            f'<text x="{left - 6:.1f}" y="{y + 13}" text-anchor="end">{escape(_short(name, _SHORT))}</text>'
        )
        parts.append(
            f'<rect class="bar" x="{left:.1f}" y="{y}" width="{max(wide, 1):.1f}" height="17" rx="2"/>'
        )
        parts.append(
            f'<text class="num" x="{left + wide + 6:.1f}" y="{y + 13}">{_number(value)} {escape(unit)}</text>'
        )
    return _svg(parts, _TOP + 24 * len(names) + 4, label)


def binned(values: NDArray[Any], names: Sequence[str], most: int) -> tuple[NDArray[Any], list[str]]:
    """At most so many rows of ``(rows, columns)``: where there are more, neighbours are averaged and have the first one's name."""
    if len(values) <= most:
        return values, list(names)
    edges = np.linspace(0, len(values), most + 1).astype(int)
    means = np.stack([values[start:stop].mean(axis=0) for start, stop in pairwise(edges)])
    return means, [names[start] for start in edges[:-1]]


def _cells(values: NDArray[Any], left: float, top: float, wide: float, tall: float) -> str:
    """Cells as one path for each shade: a tenth of the bytes that a rectangle each would take."""
    shades = np.nan_to_num(
        np.clip(np.ceil(np.nan_to_num(values) * _LEVELS - 1e-9), 0, _LEVELS)
    ).astype(int)
    parts = []
    for shade in range(1, _LEVELS + 1):
        found = np.argwhere(shades == shade)
        if len(found):
            path = "".join(
                f"M{left + column * wide:.1f} {top + row * tall:.1f}h{wide:.1f}v{tall:.1f}h-{wide:.1f}z"
                for row, column in found
            )
            parts.append(f'<path class="ink" fill-opacity="{shade / _LEVELS:.2f}" d="{path}"/>')
    return "".join(parts)


def _svg(parts: Sequence[str], height: float, label: str) -> Markup:
    inner = "".join(parts)
    return Markup(  # noqa: S704 (escaped)
        f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{inner}</svg>'
    )


def _scale(low: float, high: float, start: float, stop: float) -> Any:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def _ticks(low: float, high: float, ceiling: float | None = None) -> list[float]:
    """Four to seven round numbers around a range."""
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [step * number for number in range(first, max(last, first + 1) + 1)]
    return [tick for tick in ticks if ceiling is None or tick <= ceiling + 1e-9]


def _whole(low: float, high: float) -> list[int]:
    """Up to seven whole numbers within a range."""
    step = max(
        1,
        next(
            size
            for size in (10**power * factor for power in range(9) for factor in (1, 2, 5))
            if size >= (high - low) / 6
        ),
    )
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def _apart(ends: Sequence[tuple[float, Line]]) -> list[tuple[float, Line]]:
    """Heights of names, moved so that none covers another."""
    ordered = sorted(ends, key=lambda end: end[0])
    heights = [height for height, _ in ordered]
    for number in range(1, len(heights)):
        heights[number] = max(heights[number], heights[number - 1] + _LINE)
    excess = max(0.0, heights[-1] - (_HEIGHT - _BOTTOM)) if heights else 0.0
    return [(height - excess, line) for height, (_, line) in zip(heights, ordered, strict=True)]


def _short(name: str, most: int) -> str:
    """The last characters are kept: they tell the clients of one group apart."""
    return name if len(name) <= most else f"{name[: most - 6]}…{name[-5:]}"


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0 or 0.01 <= abs(value) < 10_000:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:,.0f}"
