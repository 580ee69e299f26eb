"""Where the time of a run goes: what is marked as ``spent`` on something, while somebody is ``timing``."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, get_args

Part = Literal["train", "evaluate", "server", "save", "other"]


@dataclass
class Clock:
    """Seconds of wall time by part; each moment counts for the innermost part that it is spent on."""

    seconds: dict[Part, float] = field(default_factory=lambda: dict.fromkeys(get_args(Part), 0.0))
    _within: list[Part] = field(default_factory=list)
    _since: float = 0.0

    @property
    def overhead(self) -> float:
        """The share of the time that is neither training nor evaluation, 0 to 1."""
        total = sum(self.seconds.values())
        return 1 - (self.seconds["train"] + self.seconds["evaluate"]) / total if total else 0.0

    def enter(self, part: Part) -> None:
        """From now on time is spent on this part."""
        self._charge()
        self._within.append(part)

    def leave(self) -> None:
        """From now on time is spent on what it was before ``enter``."""
        self._charge()
        self._within.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._within:
            self.seconds[self._within[-1]] += now - self._since
        self._since = now


_CLOCK: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def timing() -> Iterator[Clock]:
    """Within, what is marked is counted, in this thread."""
    clock = Clock()
    token = _CLOCK.set(clock)
    try:
        yield clock
    finally:
        _CLOCK.reset(token)


@contextmanager
def timed(part: Part) -> Iterator[None]:
    """Mark time as spent on this part; does nothing where nobody is timing."""
    clock = _CLOCK.get()
    if clock is None:
        yield
        return
    clock.enter(part)
    try:
        yield
    finally:
        clock.leave()
