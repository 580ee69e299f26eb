"""Specifications of figures: what they show, independent of how they are drawn.

``svg.py`` draws them as SVG, for the HTML report and for the progress of a run in a notebook.
``render.py`` draws them with matplotlib, for files, trackers and other figures in notebooks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """A line of a chart, with an optional band. Points whose ``y`` is not finite are omitted."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int = 0
    """Index into the palette's colors and dashes, 0 to 5."""
    kind: Literal["main", "second", "reference"] = "main"
    """main: the color and dashes of ``style``. second: the color of ``style``, thin and dotted, for
    another quantity of the same method. reference: gray and dashed, for a constant."""


@dataclass(frozen=True)
class Lines:
    """A line chart."""

    series: Sequence[Line]
    x: str
    """Title of the x axis, with its unit."""
    y: str
    """Title of the y axis, with its unit."""
    floor: float | None = None
    """Value at or below which the y axis begins."""
    ceiling: float | None = None
    """Upper limit of the y axis."""


@dataclass(frozen=True)
class MethodScores:
    """The scores of one method."""

    name: str
    values: Sequence[float]
    """One score per client; scores that are not finite are omitted."""
    style: int
    """Index into the palette's colors."""
    mean: float = math.nan
    """Mean over the clients that have a score; used by ``Spread``."""


@dataclass(frozen=True)
class Dumbbell:
    """Dumbbell chart: one row per client, in the order of ``names``, and one mark per method."""

    names: Sequence[str]
    """Names of the clients."""
    methods: Sequence[MethodScores]
    """The method of interest, then one to three others. A bar connects the first two."""
    x: str
    """Name of the score, which is part of the x axis's title."""
    greater_is_better: bool = True
    intervals: Sequence[tuple[float, float]] | None = None
    """Confidence interval of each score of the first method; (nan, nan) where there is none."""
    span: Sequence[float] = ()
    """Scores that the axis must include, so that several charts have the same axis."""


@dataclass(frozen=True)
class Spread:
    """Scores of methods, one row per method and one dot per client."""

    methods: Sequence[MethodScores]
    x: str
    """Name of the score, which is part of the x axis's title."""
    greater_is_better: bool = True


@dataclass(frozen=True)
class Heat:
    """A heat map of values from 0 to ``top``; 0 is blank."""

    values: NDArray[Any]
    """``(rows, columns)``."""
    rows: Sequence[str]
    columns: Sequence[str]
    """Names of the columns; empty for no names."""
    x: str
    """Title of the columns."""
    label: str
    """Meaning of the values, with their unit."""
    top: float = 1.0
    """Value of the strongest color."""
    groups: Sequence[str] = ()
    """Group of each row. Rows of a group are adjacent. Empty if there are no groups."""


@dataclass(frozen=True)
class Strip:
    """Several adjacent heat maps of values from 0 to 1."""

    panels: Sequence[tuple[str, NDArray[Any]]]
    """Titles and values ``(rows, columns)``."""
    x: str
    """Title of the columns of all panels."""
    y: str
    """Title of the rows."""
    label: str
    """Meaning of the values."""


@dataclass(frozen=True)
class Bars:
    """A bar chart with one named bar per value."""

    names: Sequence[str]
    values: Sequence[float]
    unit: str
    label: str
    """Meaning of the values, with their unit."""
    styles: Sequence[int] = ()
    """Indices into the palette's colors, one per bar. Default: the first color for all bars."""


Drawing = Lines | Dumbbell | Spread | Heat | Strip | Bars
