"""Charts of the clients' scores under several methods, as SVG: ``Dumbbell`` and ``Spread``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain

from markupsafe import Markup, escape

from fedmerge_peft.plotting.specs import Dumbbell, MethodScores, Spread
from fedmerge_peft.plotting.svg_marks import (
    LINE,
    WIDTH,
    Scale,
    flow,
    label,
    log_ticks,
    mark,
    number,
    scale,
    short,
    svg,
    text,
    text_width,
    ticks,
    wrapped,
)
from fedmerge_peft.util.text import printable

MAX_CLIENTS = 240
"""Limit L on the rows of a dumbbell chart. Of m > L clients, every ⌈m / L⌉-th is drawn."""
_NAMED = 80
"""Limit on clients for charts that print, in every row, the client's name and its gain: the score
of the first method minus that of the second, with the sign reversed if lower is better."""
_WRAPPED = 30
"""Limit on clients for charts in which a name may take two lines."""
_TALL = 320
"""Height of the grid above which the tick labels are repeated at its top."""
_RATIO = 20.0
"""The axis of a lower-is-better metric is logarithmic if all scores are positive and the greatest
is more than this many times the least."""
_NAME = 0.42
"""Limit on the fraction of the width that names take."""


def dumbbell(drawing: Dumbbell) -> Markup:
    """Draw one row for each client with scores of the first two methods, up to ``MAX_CLIENTS``.

    Return an empty string if there is no such client, or only one method.
    """
    methods = drawing.methods
    values = [value for method in methods for value in method.values if math.isfinite(value)]
    kept = [
        row
        for row in range(len(drawing.names))
        if all(math.isfinite(method.values[row]) for method in methods[:2])
    ]
    if not kept or len(methods) < 2:
        return Markup("")
    step = math.ceil(len(kept) / MAX_CLIENTS)
    kept = kept[::step]
    named = len(kept) <= _NAMED
    left = 8 + min(max(text_width(drawing.names[row]) for row in kept), _NAME * WIDTH)
    height = 15.0 if named else max(4.5, 950 / len(kept))
    if len(kept) <= _WRAPPED:
        height = 28.0 if any(text_width(drawing.names[row]) > left - 8 for row in kept) else 20.0
    right = WIDTH - (46 if named else 10)
    legend, top = _legend(drawing)
    spans = [span for span in drawing.intervals or () if math.isfinite(sum(span))]
    across, marks = _axis(
        [*values, *chain(*spans), *drawing.span], left + 6, right - 6, drawing.greater_is_better
    )
    bottom = top + 24 + height * len(kept)
    parts = [*legend, *_grid(across, marks, top + 18, bottom)]
    if named:
        parts.append(text("num", WIDTH, top + 10, "gain", anchor="end"))
    for index, row in enumerate(kept):
        y = top + 24 + height * (index + 0.5)
        parts.append(_row(drawing, row, y, height, across))
        if named or index % math.ceil(11 / height) == 0:
            name = drawing.names[row]
            lines = wrapped(name, left - 8) if height > 20 else [short(name, left - 8)]
            parts.append(label(left - 4, y, lines, "label" if named else "num"))
        if named:
            sign = 1 if drawing.greater_is_better else -1
            gain = sign * (methods[0].values[row] - methods[1].values[row])
            parts.append(text("num", WIDTH, y + 4, _signed(gain), anchor="end"))
    better = "right" if drawing.greater_is_better else "left"
    parts.append(_title(drawing.x, better, left, right, bottom + 32))
    first, second = methods[0], methods[1]
    return svg(
        parts,
        bottom + 40,
        f"{drawing.x} of {len(drawing.names)} clients: {first.name} against {second.name}",
    )


def spread(drawing: Spread) -> Markup:
    """Draw one row for each method that has scores: a dot per client, and the mean.

    Return an empty string if no method has scores.
    """
    rows = [
        (method, [value for value in method.values if math.isfinite(value)])
        for method in drawing.methods
    ]
    rows = [(method, finite) for method, finite in rows if finite]
    if not rows:
        return Markup("")
    left = 8 + min(max(text_width(method.name) for method, _ in rows), _NAME * WIDTH)
    right = WIDTH - 50
    across, marks = _axis(
        [value for _, finite in rows for value in finite],
        left + 6,
        right - 6,
        drawing.greater_is_better,
    )
    height = 30
    bottom = 24 + height * len(rows)
    parts = [*_grid(across, marks, 18, bottom), text("num", WIDTH, 10, "mean", anchor="end")]
    for index, (method, finite) in enumerate(rows):
        y = 24 + height * (index + 0.5)
        # Shifts separate the dots of equal scores.
        shift = [4.5 * math.sin(2.4 * number) for number in range(len(finite))]
        parts += [
            label(left - 4, y, wrapped(method.name, left - 8)),
            *(
                f'<circle class="speck s{method.style}" cx="{across(value):.1f}" '
                f'cy="{y + move:.1f}" r="2.8"/>'
                for value, move in zip(finite, shift, strict=True)
            ),
            text("num", WIDTH, y + 4, _digits(method.mean), anchor="end"),
        ]
        if math.isfinite(method.mean):
            x = f'x1="{across(method.mean):.1f}" x2="{across(method.mean):.1f}"'
            parts.append(
                f'<line class="mean s{method.style}" {x} y1="{y - 11:.1f}" y2="{y + 11:.1f}"/>'
            )
    better = "right" if drawing.greater_is_better else "left"
    parts.append(_title(drawing.x, better, left, right, bottom + 32))
    means = "; ".join(f"{method.name} {number(method.mean)}" for method, _ in rows)
    return svg(parts, bottom + 40, f"{drawing.x}, means: {means}")


def is_logarithmic(values: Sequence[float], *, greater_is_better: bool) -> bool:
    """Return True if scores, such as perplexities, need a logarithmic axis (``_RATIO``)."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    return not greater_is_better and low > 0 and high / low > _RATIO


def _axis(
    values: Sequence[float], left: float, right: float, greater_is_better: bool
) -> tuple[Scale, list[float]]:
    low, high = min(values), max(values)
    log = is_logarithmic(values, greater_is_better=greater_is_better)
    ceiling = 1.0 if greater_is_better and high <= 1 else None
    marks = log_ticks(low, high) if log else ticks(low, high, ceiling)
    if ceiling and marks[-1] < high:
        marks.append(1.0)
    return scale(marks[0], marks[-1], left, right, log=log), marks


def _grid(across: Scale, marks: Sequence[float], top: float, bottom: float) -> list[str]:
    parts = []
    for tick in marks:
        x = f'x1="{across(tick):.1f}" x2="{across(tick):.1f}"'
        parts.append(f'<line class="grid" {x} y1="{top:.1f}" y2="{bottom:.1f}"/>')
        for y in (top - 8, bottom + 14) if bottom - top > _TALL else (bottom + 14,):
            parts.append(text("num", across(tick), y, number(tick), anchor="middle"))
    return parts


def _title(title: str, better: str, left: float, right: float, y: float) -> str:
    full = f"{title} (further {better} is better)"
    center = (left + right) / 2
    half = text_width(full) / 2
    center = min(max(center, half), WIDTH - half)
    return text("axis", center, y, full, anchor="middle")


def _legend(drawing: Dumbbell) -> tuple[list[str], float]:
    """Return the parts of a legend, and its height."""
    names = [method.name for method in drawing.methods]
    extra = ["95 % interval"] if drawing.intervals else []
    places = flow([text_width(name) + 34 for name in [*names, *extra]], 2)
    parts = []
    for shape, (method, (x, row)) in enumerate(zip(drawing.methods, places, strict=False)):
        y = 8 + LINE * row
        parts.append(mark(shape, x + 6, y, 4, method.style))
        parts.append(text("label", x + 15, y + 4, short(method.name, WIDTH - x - 15)))
    if extra:
        x, row = places[-1]
        y = 8 + LINE * row
        line = f'x1="{x:.1f}" x2="{x + 16:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="whisker" {line}/>')
        parts.append(text("label", x + 21, y + 4, extra[0]))
    return parts, LINE * (places[-1][1] + 1) + 8


def _row(drawing: Dumbbell, row: int, y: float, height: float, across: Scale) -> str:
    """Draw a client's row. Its title, which browsers show on hover, contains all scores."""
    methods = drawing.methods
    first, second = methods[0].values[row], methods[1].values[row]
    wins = (first >= second) == drawing.greater_is_better or first == second
    bar = f'x1="{across(second):.1f}" x2="{across(first):.1f}" y1="{y:.1f}" y2="{y:.1f}"'
    thick = min(6.0, 0.7 * height)
    winner = methods[0 if wins else 1].style
    parts = [f'<line class="bar s{winner}" stroke-width="{thick:.1f}" {bar}/>']
    if drawing.intervals and math.isfinite(sum(drawing.intervals[row])):
        low, high = map(across, drawing.intervals[row])
        span = f'x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.insert(0, f'<line class="whisker" {span}/>')
    radius = min(4.5, 0.42 * height)
    for shape in reversed(range(len(methods))):
        value = methods[shape].values[row]
        if math.isfinite(value):
            parts.append(mark(shape, across(value), y, radius, methods[shape].style))
    scores = ", ".join(_described(method, row) for method in methods)
    title = escape(printable(f"{drawing.names[row]}: {scores}"))
    return f"<g><title>{title}</title>{''.join(parts)}</g>"


def _described(method: MethodScores, row: int) -> str:
    return f"{method.name} {number(method.values[row])}"


def _digits(value: float) -> str:
    """Format a number with three significant digits, including trailing zeros."""
    return f"{value:#.3g}".rstrip(".") if math.isfinite(value) else number(value)


def _signed(gain: float) -> str:
    digits = f"{abs(gain):.2f}" if abs(gain) < 10 else f"{abs(gain):.0f}"
    sign = "" if float(digits) == 0 else "+" if gain > 0 else "−"
    return sign + digits
