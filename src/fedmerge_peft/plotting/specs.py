"""Figures as data; ``svg.py`` draws them for the page, ``render.py`` for files and trackers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """A line with an optional band. Points that are not finite are omitted."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int = 0
    """Index into the palette's colors and dashes, 0 to 5."""


@dataclass(frozen=True)
class Lines:
    """A line chart."""

    series: Sequence[Line]
    x: str
    """Title of the x axis, with its unit."""
    y: str
    """Title of the y axis, with its unit."""
    floor: float | None = None
    """Value that the y axis must include at its lower end."""
    ceiling: float | None = None
    """Upper limit of the y axis."""


@dataclass(frozen=True)
class Heat:
    """A heat map of values from 0 to ``top``; 0 is blank."""

    values: NDArray[Any]
    """``(rows, columns)``."""
    rows: Sequence[str]
    columns: Sequence[str]
    x: str
    """Title of the columns."""
    label: str
    """Meaning of the values, with their unit."""
    top: float = 1.0
    """Value of the strongest color."""


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


Drawing = Lines | Heat | Strip | Bars
