"""Figures by matplotlib: as files for papers and slides, and for trackers; a page has figures of its own (``plotting/svg.py``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.specs import Bars, Drawing, Heat, Lines, Strip
from fedmerge_peft.util.text import printable

SUFFIXES = (".png", ".svg")
_COLORS = (
    "#0072b2",
    "#d55e00",
    "#007a5a",
    "#a8457f",
    "#6b5800",
    "#444444",
)  # the page's, told apart by colour-blind readers
_DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 2)), "-")
_SHADES = "Blues"
_ROW = 0.19
"""Inches of a named row of a heat map."""
_TALLEST = 8.0
_LINES_TALL = 3.6
_MOST_NAMES = 40
_SHORT = 30
"""Characters of a name beside a heat map."""


def save(drawing: Drawing, title: str, path: Path) -> list[Path]:
    """Write ``path`` with each of ``SUFFIXES``, in place of what is there; its folder is made where it is missing.

    Raises:
        RunError: The folder or a file cannot be written.
    """
    from matplotlib import rc_context

    paths = [path.with_name(path.name + suffix) for suffix in SUFFIXES]
    with rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": path.name}
    ):  # text stays text, and the same figure the same file
        drawn = draw(drawing, title)
        for each in paths:
            try:
                each.parent.mkdir(parents=True, exist_ok=True)
                drawn.savefig(
                    each, dpi=150, metadata={"Date": None} if each.suffix == ".svg" else None
                )
            except OSError as error:
                raise RunError(f"{each} cannot be written: {error.strerror or error}") from error
    return paths


def draw(drawing: Drawing, title: str) -> Any:
    """A ``matplotlib.figure.Figure``."""
    match drawing:
        case Lines():
            figure, axes = _blank(6.4, _LINES_TALL, title)
            _lines(axes, drawing)
        case Heat():
            tall = min(max(2.2, _ROW * len(drawing.values)), _TALLEST)
            wide = min(max(4.8, 2.2 + 0.3 * drawing.values.shape[1]), 9.0)
            figure, axes = _blank(wide, tall + 1.2, title)
            _heat(figure, axes, drawing)
        case Strip():
            figure = _strip(drawing, title)
        case Bars():
            figure, axes = _blank(6.4, 1.2 + 0.35 * len(drawing.names), title)
            _bars(axes, drawing)
    return figure


def _blank(wide: float, tall: float, title: str, panels: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(wide, tall), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_wrapped(title, wide), fontsize="medium", parse_math=False)
    return figure, figure.subplots(1, panels, squeeze=panels == 1)


def _wrapped(title: str, wide: float) -> str:
    import textwrap

    return textwrap.fill(printable(title), width=round(11 * wide))


def _lines(axes: Any, drawing: Lines) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in drawing.series:
        color = _COLORS[line.style % len(_COLORS)]
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        there = np.isfinite(y)
        axes.plot(
            x[there],
            y[there],
            color=color,
            linestyle=_DASHES[line.style % len(_DASHES)],
            marker="o",
            markersize=3.5,
            label=line.name,
        )
        if line.low is not None and line.high is not None:
            low, high = np.asarray(line.low, float), np.asarray(line.high, float)
            axes.fill_between(
                x, low, high, where=np.isfinite(low + high), color=color, alpha=0.15, linewidth=0
            )
    if drawing.floor is not None:
        axes.set_ylim(
            bottom=min(drawing.floor, axes.get_ylim()[0])
            if drawing.ceiling is None
            else drawing.floor
        )
    if drawing.ceiling is not None:
        axes.set_ylim(top=min(1.02 * drawing.ceiling, 1.05 * axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(drawing.x)
    axes.set_ylabel(_wrapped(drawing.y, _LINES_TALL - 0.6))
    axes.grid(alpha=0.3)
    if len(drawing.series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _heat(figure: Any, axes: Any, drawing: Heat) -> None:
    shown = np.ma.masked_less_equal(np.nan_to_num(drawing.values), 0)
    image = axes.imshow(
        shown, cmap=_SHADES, vmin=0, vmax=drawing.top or 1, aspect="auto", interpolation="nearest"
    )
    _names(axes.yaxis, drawing.rows)
    _names(axes.xaxis, drawing.columns, turned=max(map(len, drawing.columns), default=0) > 3)
    axes.set_xlabel(drawing.x)
    figure.colorbar(image, ax=axes, label=drawing.label)


def _strip(drawing: Strip, title: str) -> Any:
    count = max(len(drawing.pictures), 1)
    square = all(values.shape[0] == values.shape[1] for _, values in drawing.pictures)
    figure, panels = _blank(min(1.2 + (3.4 if square else 1.5) * count, 10.0), 3.9, title, count)
    image = None
    for panel, (name, values) in zip(np.ravel(panels), drawing.pictures, strict=True):
        image = panel.imshow(
            values,
            cmap=_SHADES,
            vmin=0,
            vmax=1,
            aspect="equal" if square else "auto",
            interpolation="nearest",
        )
        panel.set_title(name, fontsize="small")
        panel.set_xticks([])
        panel.set_yticks([])
    figure.supxlabel(drawing.x, fontsize="medium")
    figure.supylabel(drawing.y, fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=np.ravel(panels).tolist(), label=drawing.label)
    return figure


def _bars(axes: Any, drawing: Bars) -> None:
    places = np.arange(len(drawing.names))
    values = [value if math.isfinite(value) else 0.0 for value in drawing.values]
    drawn = axes.barh(places, values, color=_COLORS[0])
    axes.bar_label(
        drawn, labels=[f"{value:.3g} {drawing.unit}" for value in drawing.values], padding=3
    )
    axes.set_yticks(places, labels=[printable(name) for name in drawing.names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(right=1.2 * max([*values, 0.0]) or 1.0)
    axes.set_xlabel(drawing.label)
    axes.spines[["top", "right"]].set_visible(False)


def _names(axis: Any, names: Sequence[str], *, turned: bool = False) -> None:
    """Every n-th name, so that none covers another."""
    step = -(-max(len(names), 1) // _MOST_NAMES)
    labels = [_short(name) for name in names[::step]]
    axis.set_ticks(
        range(0, len(names), step),
        labels=labels,
        fontsize="small",
        parse_math=False,
        rotation=90 if turned else 0,
    )


def _short(name: str) -> str:
    """The last characters are kept: they tell the clients of one group apart."""
    name = printable(name)
    return name if len(name) <= _SHORT else f"{name[: _SHORT - 9]}…{name[-8:]}"
