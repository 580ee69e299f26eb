"""Alternating measurements of two ways to do the same work, so that other load affects both."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

TABLE = "| row | ratio | range | medians | target |\n|---|---|---|---|---|\n"
"""Head of a table of rows."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    ratio: float
    """Median over the repeats; nan if there is none to state."""
    low: float
    high: float
    """The smallest and the largest ratio of a repeat."""
    sides: str
    """The times of both sides."""
    wanted: str = ""
    """The target: a lower or an upper bound."""

    @classmethod
    def of(cls, what: str, ratios: Sequence[float], sides: str, wanted: str = "") -> Row:
        """Return the row of the ratios of all repeats."""
        return cls(what, median(ratios), min(ratios), max(ratios), sides, wanted)

    def __str__(self) -> str:
        ratio, spread = f"{self.ratio:.2f}", f"{self.low:.2f} to {self.high:.2f}"
        if math.isnan(self.ratio):
            ratio = spread = "–"
        return f"| {self.what} | {ratio} | {spread} | {self.sides} | {self.wanted} |"


def race(
    sides: Mapping[str, Callable[[], object]],
    repeats: int,
    warm: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Return the seconds of each side in each repeat; every other repeat reverses the order."""
    if warm:
        for work in sides.values():
            work()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            begin = clock()
            sides[name]()
            taken[name].append(clock() - begin)
    return taken


def faster(
    what: str, taken: Mapping[str, list[float]], ours: str, theirs: str, wanted: str = ""
) -> Row:
    """Return the row of the ratio theirs / ours."""
    ratios = [b / a for a, b in zip(taken[ours], taken[theirs], strict=True)]
    sides = f"{ours} {seconds(median(taken[ours]))}, {theirs} {seconds(median(taken[theirs]))}"
    return Row.of(what, ratios, sides, wanted)


def seconds(value: float) -> str:
    """Format a time as s or ms."""
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.3g} ms"
