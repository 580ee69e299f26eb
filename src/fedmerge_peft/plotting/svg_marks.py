"""Parts of all SVG figures: texts, scales, ticks, legends."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup, escape

from fedmerge_peft.util.text import printable

WIDTH = 400
"""Width of all figures in view box units, about the width of a phone in CSS pixels."""
_CHARACTER = 6.5
"""Mean width of a character of a label. Wide (East Asian) characters count twice."""
_SMALL = 6.1
"""Mean width of a character of small text, such as the names of a heat map's rows."""
LINE = 14
"""Height of a line of text."""

Scale = Callable[[float], float]


def text_width(text: str, *, small: bool = False) -> float:
    """Estimate the width of a text, in the units of ``WIDTH``."""
    return (_SMALL if small else _CHARACTER) * _columns(printable(text))


def short(name: str, width: float, *, small: bool = False) -> str:
    """Shorten a name in the middle if it is wider than ``width``, to eight characters at least.

    The end is kept because it distinguishes the clients of a group.
    """
    name = printable(name)
    most = max(int(width / (_SMALL if small else _CHARACTER) + 1e-9), 8)
    if _columns(name) <= most:
        return name
    end = min(most // 3, 8)
    return f"{_beginning(name, most - end - 1)}…{_beginning(name[::-1], end)[::-1]}"


def wrapped(name: str, width: float, *, small: bool = False) -> list[str]:
    """Break a name into two lines at a space if it is wider than ``width``.

    Lines that are still wider are shortened, as is a name without a space.
    """
    name = printable(name)
    words = name.split(" ")
    breaks = [(" ".join(words[:at]), " ".join(words[at:])) for at in range(1, len(words))]
    if text_width(name, small=small) <= width or not breaks:
        return [short(name, width, small=small)]
    best = min(breaks, key=lambda lines: max(map(text_width, lines)))
    return [short(line, width, small=small) for line in best]


def label(
    x: float, y: float, lines: Sequence[str], kind: str = "label", *, anchor: str = "end"
) -> str:
    """Draw lines of text, centered vertically at y."""
    first = y + 4 - 0.45 * LINE * (len(lines) - 1)
    return "".join(
        text(kind, x, first + 0.9 * LINE * row, line, anchor=anchor)
        for row, line in enumerate(lines)
    )


def _columns(text: str) -> int:
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def _beginning(text: str, columns: int) -> str:
    while _columns(text) > columns:
        text = text[: min(len(text) - 1, columns)]
    return text


def text(kind: str, x: float, y: float, content: str, *, anchor: str = "start") -> str:
    """Draw a line of text. ``kind`` is a class of the style sheet."""
    side = "" if anchor == "start" else f' text-anchor="{anchor}"'
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}"{side}>{escape(printable(content))}</text>'


def mark(shape: int, x: float, y: float, radius: float, style: int) -> str:
    """Draw shape 0 to 3: a filled circle, a hollow circle, a hollow diamond, a hollow triangle."""
    if shape < 2:
        kind = "hollow" if shape else "dot"
        return f'<circle class="{kind} s{style}" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
    r = 1.2 * radius
    outline = f"l{r:.1f} {r:.1f}l-{r:.1f} {r:.1f}l-{r:.1f} -{r:.1f}z"
    if shape > 2:
        outline = f"l{r:.1f} {1.8 * r:.1f}h-{2 * r:.1f}z"
    return f'<path class="hollow s{style}" d="M{x:.1f} {y - r:.1f}{outline}"/>'


def flow(widths: Sequence[float], left: float) -> list[tuple[float, int]]:
    """Return the x coordinate and row number of each item in a legend.

    Items are placed side by side from ``left``, as many per row as fit into ``WIDTH``.
    """
    x, row, places = left, 0, []
    for width in widths:
        if x > left and x + width > WIDTH:
            x, row = left, row + 1
        places.append((x, row))
        x += width
    return places


def svg(parts: Iterable[str], height: float, label: str) -> Markup:
    """Return an ``svg`` element. The label describes the figure to screen readers."""
    alternative = escape(printable(label))
    attributes = f'viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{alternative}"'
    return Markup(f"<svg {attributes}>{''.join(parts)}</svg>")  # noqa: S704 (parts are escaped)


def scale(low: float, high: float, start: float, stop: float, *, log: bool = False) -> Scale:
    """Return the map from ``[low, high]`` to ``[start, stop]``, linear or logarithmic."""
    if log:
        linear = scale(math.log(low), math.log(high), start, stop)
        return lambda value: linear(math.log(value))
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (stop - start)


def ticks(low: float, high: float, ceiling: float | None = None) -> list[float]:
    """Return round numbers that enclose a range: four to seven, or two if the range is one point.

    Numbers above ``ceiling`` are omitted.
    """
    span = (high - low) or abs(high) or 1.0
    power = 10.0 ** math.floor(math.log10(span / 4))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= span / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    values = [step * number for number in range(first, max(last, first + 1) + 1)]
    return [tick for tick in values if ceiling is None or tick <= ceiling + 1e-9]


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers that enclose a positive range, with nearly equal ratios."""
    for factors in ((1, 2, 5), (1, 3), (1,)):
        powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
        values = [factor * 10.0**power for power in powers for factor in factors]
        first = max(number for number, tick in enumerate(values) if tick <= low * (1 + 1e-9))
        last = min(number for number, tick in enumerate(values) if tick >= high * (1 - 1e-9))
        if last - first < 7:
            break
    step = max(1, (last - first) // 6)
    return values[first : last + step : step]


def whole(low: float, high: float) -> list[int]:
    """Return up to seven whole numbers within a range."""
    sizes = (10**power * factor for power in range(9) for factor in (1, 2, 5))
    step = max(1, next(size for size in sizes if size >= (high - low) / 6))
    return list(range(math.ceil(low / step) * step, math.floor(high) + 1, step))


def number(value: float) -> str:
    """Format a number with three significant digits.

    Numbers below 0.01 have two digits; from 1000 on, numbers are rounded to integers. Infinity
    becomes ∞; nan and -infinity become a dash.
    """
    if not math.isfinite(value):
        return "∞" if value > 0 else "–"
    if value == 0 or 0.01 <= abs(value) < 999.5:  # 999.5 is rounded to 1,000
        return f"{value:.3g}"
    return f"{value:.2g}" if abs(value) < 1 else f"{value:,.0f}"
