"""What a figure shows, whoever draws it: ``svg.py`` for the page, ``render.py`` for files and trackers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray


@dataclass(frozen=True)
class Line:
    """A line, and a band around it. Points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    style: int = 0
    """Which of the colours and dashes, 0 to 5."""


@dataclass(frozen=True)
class Lines:
    """Lines with their names."""

    series: Sequence[Line]
    x: str
    """Title of the x axis, with its unit."""
    y: str
    """What the y axis shows, with its unit."""
    floor: float | None = None
    """Lowest value that the y axis shows in any case."""
    ceiling: float | None = None
    """Highest value that the y axis goes to."""


@dataclass(frozen=True)
class Heat:
    """A heat map of values from 0 to ``top``, stronger in colour for more; 0 is blank."""

    values: NDArray[Any]
    """``(rows, columns)``."""
    rows: Sequence[str]
    columns: Sequence[str]
    x: str
    """Title of the columns."""
    label: str
    """What the values are, with their unit."""
    top: float = 1.0
    """The value of the strongest colour."""


@dataclass(frozen=True)
class Strip:
    """Several heat maps of values from 0 to 1 beside each other, each with a title."""

    pictures: Sequence[tuple[str, NDArray[Any]]]
    x: str
    """What the columns of each are."""
    y: str
    """What the rows are."""
    label: str
    """What the values are."""


@dataclass(frozen=True)
class Bars:
    """A bar a name, with its value written beside it."""

    names: Sequence[str]
    values: Sequence[float]
    unit: str
    label: str
    """What the values are, with their unit."""


Drawing = Lines | Heat | Strip | Bars
