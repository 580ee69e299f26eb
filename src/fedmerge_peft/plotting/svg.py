"""Draw figures as SVG, for the HTML report and for the progress of a run in a notebook.

The style sheet of the page sets the colors; in the report, it has a light and a dark mode. All
figures are ``WIDTH`` units wide, about a phone's width in CSS pixels, so that text stays legible
when the page scales them.
"""

from __future__ import annotations

import math

from markupsafe import Markup

from fedmerge_peft.plotting.specs import Bars, Drawing, Dumbbell, Heat, Lines, Spread, Strip
from fedmerge_peft.plotting.svg_clients import dumbbell, spread
from fedmerge_peft.plotting.svg_heat import heat, strip
from fedmerge_peft.plotting.svg_lines import lines
from fedmerge_peft.plotting.svg_marks import WIDTH, label, number, svg, text, text_width, wrapped

_BAR = 28
"""Height of a bar, including the space below it."""


def draw(drawing: Drawing) -> Markup:
    """Return a figure as an ``svg`` element.

    The result is an empty string for a ``Lines``, ``Dumbbell`` or ``Spread`` without data to draw.
    """
    match drawing:
        case Lines():
            return lines(drawing)
        case Dumbbell():
            return dumbbell(drawing)
        case Spread():
            return spread(drawing)
        case Heat():
            return heat(drawing)
        case Strip():
            return strip(drawing)
        case Bars():
            return _bars(drawing)


def _bars(drawing: Bars) -> Markup:
    """Draw one named bar per value."""
    names, values = drawing.names, drawing.values
    left = 8 + min(max(map(text_width, names), default=0.0), 0.42 * WIDTH)
    top = max([*(value for value in values if math.isfinite(value)), 0.0]) or 1.0
    room = WIDTH - left - 76
    styles = drawing.styles or [0] * len(values)
    parts = []
    for row, (name, value, style) in enumerate(zip(names, values, styles, strict=True)):
        y = 4 + _BAR * row
        wide = room * value / top if math.isfinite(value) else 0.0
        parts += [
            label(left - 6, y + 9, wrapped(name, left - 8)),
            f'<rect class="dot s{style}" x="{left:.1f}" y="{y}" width="{max(wide, 1):.1f}" '
            'height="18" rx="2"/>',
            text("num", left + wide + 6, y + 14, f"{number(value)} {drawing.unit}"),
        ]
    shares = "; ".join(f"{name} {number(value)}" for name, value in zip(names, values, strict=True))
    return svg(parts, _BAR * len(names) + 4, f"{drawing.label}: {shares}")
