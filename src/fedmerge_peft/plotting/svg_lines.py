"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from fedmerge_peft.plotting.specs import Line, Lines
from fedmerge_peft.plotting.svg_marks import (
    LINE,
    WIDTH,
    Scale,
    flow,
    number,
    scale,
    short,
    svg,
    text,
    text_width,
    ticks,
    whole,
)

_LEFT, _TOP, _BOTTOM = 44, 24, 40
"""Margins: left for y tick labels, top for the y title, bottom for x tick labels and x title."""
_HEIGHT = 250
_DOTS = 12
"""Target number of dots on a line; fewer than twice as many are drawn."""
_KEY = 24
"""Width of a line's sample together with the space between it and the line's name."""
_MAX_LABEL = 100
"""Limit on the width of names beside the lines. If a name is wider, or there are more names than
fit beside the chart, a legend below the chart has all names."""


def lines(drawing: Lines) -> Markup:
    """Draw a line chart; return an empty string if no value is finite."""
    x_values = [value for line in drawing.series for value in line.x]
    y_values = [
        value for line in drawing.series for value in _heights(line) if math.isfinite(value)
    ]
    if not y_values:
        return Markup("")
    named = [line for line in drawing.series if any(map(math.isfinite, line.y))]
    label = max(text_width(line.name) for line in named)
    beside = label <= _MAX_LABEL and len(named) <= (_HEIGHT - _TOP - _BOTTOM) / LINE
    right, bottom = WIDTH - (label + _KEY + 8 if beside else 12), _HEIGHT - _BOTTOM
    lowest = min([*y_values, *([] if drawing.floor is None else [drawing.floor])])
    marks = ticks(lowest, max(y_values), drawing.ceiling)
    across = scale(min(x_values), max(x_values), _LEFT, right)
    up = scale(marks[0], marks[-1], bottom, _TOP)
    parts = [text("axis", 0, 12, short(drawing.y, WIDTH))]
    for tick in marks:
        level = f'y1="{up(tick):.1f}" y2="{up(tick):.1f}"'
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{right:.1f}" {level}/>')
        parts.append(text("num", _LEFT - 6, up(tick) + 4, number(tick), anchor="end"))
    for tick in whole(min(x_values), max(x_values)):
        parts.append(text("num", across(tick), bottom + 16, str(tick), anchor="middle"))
    parts.append(text("axis", (_LEFT + right) / 2, _HEIGHT - 6, drawing.x, anchor="middle"))
    ends = []
    for line in named:
        parts.append(_band(line, across, up))
        points = [
            (across(a), up(b)) for a, b in zip(line.x, line.y, strict=True) if math.isfinite(b)
        ]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline class="{_classes(line)}" points="{path}"/>')
        if line.kind == "main":
            parts += [
                f'<circle class="dot s{line.style}" cx="{a:.1f}" cy="{b:.1f}" r="2.6"/>'
                for a, b in points[:: max(1, len(points) // _DOTS)]
            ]
        ends.append((points[-1][1], line))
    height = float(_HEIGHT)
    if beside:
        for y, line in _separated(ends):
            parts += _key(line, right + 6, y)
    else:
        places = flow([_KEY + text_width(line.name) + 14 for line in named], _LEFT)
        for line, (x, row) in zip(named, places, strict=True):
            parts += _key(line, x, height + 8 + LINE * row)
        height += 16 + LINE * (places[-1][1] + 1)
    finals = "; ".join(f"{line.name} ends at {number(line.y[-1])}" for line in named)
    return svg(parts, height, f"{drawing.y} by {drawing.x}: {finals}")


def _heights(line: Line) -> list[float]:
    return [*line.y, *(line.low or []), *(line.high or [])]


def _classes(line: Line) -> str:
    kind = "" if line.kind == "main" else f" {line.kind}"
    return "line reference" if line.kind == "reference" else f"line s{line.style}{kind}"


def _band(line: Line, across: Scale, up: Scale) -> str:
    if line.low is None or line.high is None:
        return ""
    finite = [
        (a, low, high)
        for a, low, high in zip(line.x, line.low, line.high, strict=True)
        if math.isfinite(low + high)
    ]
    upper = [(a, high) for a, _, high in finite]
    lower = [(a, low) for a, low, _ in reversed(finite)]
    outline = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in upper + lower)
    return f'<polygon class="band s{line.style}" points="{outline}"/>'


def _key(line: Line, x: float, y: float) -> list[str]:
    sample = f'x1="{x:.1f}" x2="{x + 18:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    room = WIDTH - x - _KEY
    return [
        f'<line class="{_classes(line)}" {sample}/>',
        text("label", x + _KEY, y + 4, short(line.name, room)),
    ]


def _separated(ends: Sequence[tuple[float, Line]]) -> list[tuple[float, Line]]:
    """Move the names at the ends of the lines apart vertically, so that they do not overlap."""
    ordered = sorted(ends, key=lambda end: end[0])
    heights = [height for height, _ in ordered]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + LINE)
    limit = float(_HEIGHT - _BOTTOM)
    for index in reversed(range(len(heights))):
        heights[index] = min(heights[index], limit)
        limit = heights[index] - LINE
    return [(height, line) for height, (_, line) in zip(heights, ordered, strict=True)]
