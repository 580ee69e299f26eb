"""Coordinate-wise search for the values of a method, over ladders of candidates.

The axes are searched one after another: the first at the defaults of the others, each further one
at the best values so far. The score decides; among equal scores, the candidate that was tried
first. While the best value is the lowest or the highest of those tried, the next value of the
ladder is tried too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Choice = tuple[Any, ...]
"""A candidate: one value for each axis."""


@dataclass(frozen=True)
class Axis:
    """Values of one key of the recipe."""

    key: str
    values: tuple[Any, ...]
    """The ladder, ascending: all values that may be tried."""
    first: tuple[Any, ...]
    """Neighboring values that are always tried; the first is the default."""

    def next_to(self, best: Any, tried: Sequence[Any]) -> list[Any]:
        """Return the value beyond the edge of the tried ones, if the best one is at this edge."""
        place = self.values.index(best)
        beyond = self.values[max(place - 1, 0) : place + 2]
        return [value for value in beyond if value not in tried]

    def at_end(self, value: Any) -> bool:
        """Return True if further values might be better, but the ladder ends at this one.

        An integer at the lower end has no value below it, such as no momentum or one pass.
        """
        return value == self.values[-1] or (value == self.values[0] and not isinstance(value, int))


@dataclass(frozen=True)
class Search:
    """State of a search."""

    best: Choice
    """The best candidate so far; the result if nothing is waiting."""
    waiting: list[Choice]
    """Candidates whose scores the search needs next."""
    planned: int
    """Smallest number of further candidates; those waiting included."""


def search(axes: Sequence[Axis], score: Callable[[Choice], float | None]) -> Search:
    """Continue a search from the scores that are known.

    Args:
        axes: Axes, in the order of the search. Without axes, the only candidate is ``()``.
        score: Function that returns a candidate's score, greater is better, or None if unknown.
    """
    best: Choice = tuple(axis.first[0] for axis in axes)
    for place, axis in enumerate(axes):
        tried = list(axis.first)
        while True:
            line = [(*best[:place], value, *best[place + 1 :]) for value in tried]
            scores = [score(candidate) for candidate in line]
            known = [each for each in scores if each is not None]
            if len(known) < len(line):
                waiting = [
                    candidate for candidate, each in zip(line, scores, strict=True) if each is None
                ]
                later = sum(len(other.first) - 1 for other in axes[place + 1 :])
                return Search(best, waiting, len(waiting) + later)
            winner = line[known.index(max(known))]
            if not (beyond := axis.next_to(winner[place], tried)):
                best = winner
                break
            tried += beyond
    return Search(best, [], 0)
