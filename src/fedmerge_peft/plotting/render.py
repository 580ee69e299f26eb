"""Draw figures with matplotlib, for files, notebooks and trackers.

``svg.py`` draws the same figures for the HTML report.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from fedmerge_peft.errors import RunError
from fedmerge_peft.plotting.palette import COLORMAP, COLORS, DASHES
from fedmerge_peft.plotting.specs import Bars, Drawing, Dumbbell, Heat, Lines, Spread, Strip
from fedmerge_peft.plotting.svg_clients import is_logarithmic
from fedmerge_peft.util.text import printable

SUFFIXES = (".png", ".svg", ".pdf")
"""File suffixes of the supported formats."""
_PAGE_SUFFIXES = (".png", ".svg")
"""Suffixes of the two files that the function ``save`` writes."""
_ROW_HEIGHT = 0.19
"""Height of a row of a heat map, inches."""
_MAX_HEIGHT = 8.0
"""Limit on the height of all rows of a heat map, inches. It is 1.5 times as high for a dumbbell
chart."""
_LINES_HEIGHT = 3.6
"""Height of a line chart, inches."""
_MAX_NAMES = 40
"""Limit on tick labels of one axis."""
_MAX_CHARACTERS = 30
"""Limit on characters of a tick label."""


def save(drawing: Drawing, title: str, path: Path) -> list[Path]:
    """Write a drawing as a PNG and an SVG file. Create the folder, and overwrite existing files.

    Args:
        drawing: The figure.
        title: Title of the figure.
        path: Path of the files without suffix.

    Returns:
        The paths.

    Raises:
        RunError: The folder or a file cannot be written.
    """
    from matplotlib import rc_context

    paths = [path.with_name(path.name + suffix) for suffix in _PAGE_SUFFIXES]
    # Keep SVG text as text, and give the same figure the same bytes.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": path.name}):
        figure = draw(drawing, title)
        for file in paths:
            metadata = {"Date": None} if file.suffix == ".svg" else None
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                figure.savefig(file, dpi=150, metadata=metadata)
            except OSError as error:
                raise RunError(f"{file} cannot be written: {error.strerror or error}") from error
    return paths


def check_suffix(path: PathLike[str] | str) -> None:
    """Raise ``RunError`` unless pictures can be written with the file's suffix."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise RunError(
            f"{path}: figures are written as {', '.join(SUFFIXES)}; use one of these suffixes"
        )


class Picture(ABC):
    """A figure that notebooks show."""

    @abstractmethod
    def draw(self) -> Any:
        """Return a new ``matplotlib.figure.Figure``, which the caller may change and save."""

    def save(self, path: PathLike[str] | str) -> Path:
        """Write a file in the format of its suffix, one of ``SUFFIXES``; return its path.

        Raises:
            RunError: The suffix is not supported, or the file cannot be written.
        """
        check_suffix(path)
        path = Path(path)
        try:
            self.draw().savefig(path, format=path.suffix.lower().removeprefix("."), dpi=150)
        except OSError as error:
            raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
        return path

    def _repr_png_(self) -> bytes:
        buffer = BytesIO()
        self.draw().savefig(buffer, format="png", dpi=110, facecolor="white")
        return buffer.getvalue()


@dataclass(frozen=True)
class DrawingPicture(Picture):
    """A figure of a report, drawn by matplotlib."""

    drawing: Drawing
    title: str

    def draw(self) -> Any:
        return draw(self.drawing, self.title)


def draw(drawing: Drawing, title: str) -> Any:
    """Draw a figure with matplotlib, and return the ``matplotlib.figure.Figure``."""
    match drawing:
        case Lines():
            figure, axes = _blank(6.4, _LINES_HEIGHT, title)
            _lines(axes, drawing)
        case Dumbbell():
            rows = len(drawing.names)
            figure, axes = _blank(6.4, min(max(1.6, 0.24 * rows), 1.5 * _MAX_HEIGHT) + 1.2, title)
            _dumbbell(axes, drawing)
        case Spread():
            figure, axes = _blank(6.4, 1.2 + 0.4 * len(drawing.methods), title)
            _spread(axes, drawing)
        case Heat():
            height = min(max(2.2, _ROW_HEIGHT * len(drawing.values)), _MAX_HEIGHT)
            width = min(max(4.8, 2.2 + 0.3 * drawing.values.shape[1]), 9.0)
            figure, axes = _blank(width, height + 1.2, title)
            _heat(figure, axes, drawing)
        case Strip():
            figure = _strip(drawing, title)
        case Bars():
            figure, axes = _blank(6.4, 1.2 + 0.35 * len(drawing.names), title)
            _bars(axes, drawing)
    return figure


def _blank(width: float, height: float, title: str, panels: int = 1) -> tuple[Any, Any]:
    """Return an empty figure of ``width`` × ``height`` inches, and its axes.

    With several panels, the axes are an array ``(1, panels)``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(_wrapped(title, width), fontsize="medium", parse_math=False)
    return figure, figure.subplots(1, panels, squeeze=panels == 1)


def _wrapped(title: str, width: float) -> str:
    import textwrap

    return textwrap.fill(printable(title), width=round(11 * width))


def _lines(axes: Any, drawing: Lines) -> None:
    from matplotlib.ticker import MaxNLocator

    for line in drawing.series:
        color, dashes = COLORS[line.style % len(COLORS)], DASHES[line.style % len(DASHES)]
        if line.kind != "main":
            color, dashes = (color, (1, 2)) if line.kind == "second" else ("gray", (5, 3))
        x, y = np.asarray(line.x, float), np.asarray(line.y, float)
        finite = np.isfinite(y)
        axes.plot(
            x[finite],
            y[finite],
            color=color,
            linestyle=(0, dashes) if dashes else "-",
            linewidth=1.6 if line.kind == "main" else 1.1,
            marker="o" if line.kind == "main" else "",
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
    axes.set_ylabel(_wrapped(drawing.y, _LINES_HEIGHT - 0.6))
    axes.grid(alpha=0.3)
    if len(drawing.series) > 1:
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _dumbbell(axes: Any, drawing: Dumbbell) -> None:
    methods = drawing.methods
    rows = np.arange(len(drawing.names))
    first, second = (np.asarray(method.values, float) for method in methods[:2])
    wins = (first >= second) if drawing.greater_is_better else (first <= second)
    winners = [COLORS[methods[0 if won else 1].style] for won in wins]
    axes.hlines(rows, first, second, colors=winners, linewidth=3, alpha=0.35)
    if drawing.intervals:
        low, high = np.asarray(drawing.intervals, float).T
        axes.hlines(rows, low, high, colors="gray", linewidth=0.8, label="95 % interval")
    for shape, method in reversed(list(zip("ooD^", methods, strict=False))):
        color = COLORS[method.style]
        face = color if method is methods[0] else "white"
        style = {"color": color, "markerfacecolor": face, "markersize": 5, "linestyle": ""}
        axes.plot(method.values, rows, marker=shape, label=method.name, **style)
    set_names(axes.yaxis, drawing.names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    scores = [*first, *second, *drawing.span]
    if drawing.span:
        margin = 0.03 * (max(drawing.span) - min(drawing.span))
        axes.set_xlim(min(drawing.span) - margin, max(drawing.span) + margin)
    _score_axis(axes, scores, drawing.x, drawing.greater_is_better)
    style = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "frameon": False}
    axes.legend(*(items[::-1] for items in axes.get_legend_handles_labels()), ncols=4, **style)


def _spread(axes: Any, drawing: Spread) -> None:
    for row, method in enumerate(drawing.methods):
        color = COLORS[method.style]
        values = np.asarray(method.values, float)
        shift = 0.14 * np.sin(2.4 * np.arange(len(values)))  # separates equal values
        axes.plot(values, row + shift, "o", color=color, alpha=0.4, markersize=4)
        if math.isfinite(method.mean):
            axes.vlines(method.mean, row - 0.35, row + 0.35, colors=color, linewidth=2)
    names = [printable(method.name) for method in drawing.methods]
    axes.set_yticks(range(len(names)), labels=names, parse_math=False)
    axes.set_ylim(len(names) - 0.4, -0.6)
    scores = [value for method in drawing.methods for value in method.values]
    _score_axis(axes, scores, drawing.x, drawing.greater_is_better)


def _score_axis(axes: Any, values: Sequence[float], title: str, greater_is_better: bool) -> None:
    if is_logarithmic(values, greater_is_better=greater_is_better):
        axes.set_xscale("log")
    better = "right" if greater_is_better else "left"
    axes.set_xlabel(f"{title} (further {better} is better)")
    axes.grid(alpha=0.3, axis="x")


def _heat(figure: Any, axes: Any, drawing: Heat) -> None:
    values = np.ma.masked_less_equal(np.nan_to_num(drawing.values), 0)
    image = axes.imshow(
        values, cmap=COLORMAP, vmin=0, vmax=drawing.top or 1, aspect="auto", interpolation="nearest"
    )
    set_names(axes.yaxis, drawing.rows)
    set_names(axes.xaxis, drawing.columns, turned=max(map(len, drawing.columns), default=0) > 3)
    for row, (above, below) in enumerate(pairwise(drawing.groups)):
        if above != below:
            axes.axhline(row + 0.5, color="gray", linewidth=0.8)
    axes.set_xlabel(drawing.x)
    if drawing.groups:
        middles = {
            group: np.flatnonzero(np.array(drawing.groups) == group).mean()
            for group in drawing.groups
            if group
        }
        side = axes.secondary_yaxis("right")
        set_names(side.yaxis, list(middles), positions=list(middles.values()))
        side.tick_params(length=0)
    figure.colorbar(image, ax=axes, label=drawing.label)


def _strip(drawing: Strip, title: str) -> Any:
    count = max(len(drawing.panels), 1)
    square = all(values.shape[0] == values.shape[1] for _, values in drawing.panels)
    width = min(1.2 + (3.4 if square else 1.5) * count, 10.0)
    figure, panel_axes = _blank(width, 3.9, title, count)
    image = None
    for axes, (name, values) in zip(np.ravel(panel_axes), drawing.panels, strict=True):
        image = axes.imshow(
            values,
            cmap=COLORMAP,
            vmin=0,
            vmax=1,
            aspect="equal" if square else "auto",
            interpolation="nearest",
        )
        axes.set_title(name, fontsize="small")
        axes.set_xticks([])
        axes.set_yticks([])
    figure.supxlabel(drawing.x, fontsize="medium")
    figure.supylabel(drawing.y, fontsize="medium")
    if image is not None:
        figure.colorbar(image, ax=np.ravel(panel_axes).tolist(), label=drawing.label)
    return figure


def _bars(axes: Any, drawing: Bars) -> None:
    positions = np.arange(len(drawing.names))
    values = [value if math.isfinite(value) else 0.0 for value in drawing.values]
    colors = [COLORS[style] for style in drawing.styles] or COLORS[0]
    rectangles = axes.barh(positions, values, color=colors)
    axes.bar_label(
        rectangles, labels=[f"{value:.3g} {drawing.unit}" for value in drawing.values], padding=3
    )
    axes.set_yticks(positions, labels=[printable(name) for name in drawing.names], parse_math=False)
    axes.invert_yaxis()
    axes.set_xlim(right=1.2 * max([*values, 0.0]) or 1.0)
    axes.set_xlabel(drawing.label)
    axes.spines[["top", "right"]].set_visible(False)


def set_names(
    axis: Any,
    names: Sequence[str],
    *,
    positions: Sequence[float] | None = None,
    turned: bool = False,
) -> None:
    """Label the ticks of an axis with names, at most ``_MAX_NAMES`` so that they do not overlap.

    Args:
        axis: The x or y axis of matplotlib axes.
        names: Names of the rows or columns.
        positions: Position of each name on the axis. Default: 0, 1, 2, ...
        turned: True to rotate the names by 90 degrees.
    """
    step = -(-max(len(names), 1) // _MAX_NAMES)
    labels = [_short(name) for name in names[::step]]
    axis.set_ticks(
        (range(len(names)) if positions is None else positions)[::step],
        labels=labels,
        fontsize="small",
        parse_math=False,
        rotation=90 if turned else 0,
    )


def _short(name: str) -> str:
    """Shorten a name in the middle: its last characters distinguish the clients of a group."""
    name = printable(name)
    return name if len(name) <= _MAX_CHARACTERS else f"{name[: _MAX_CHARACTERS - 9]}…{name[-8:]}"
