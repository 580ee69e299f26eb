"""Wall time of a run by phase: ``timed`` marks a phase, ``collect_timings`` adds up the times."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal, get_args

Phase = Literal["train", "evaluate", "server", "save", "other"]


@dataclass
class PhaseTimer:
    """Seconds of wall time by phase. Nested time counts for the innermost phase only."""

    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(get_args(Phase), 0.0))
    _active: list[Phase] = field(default_factory=list)
    _since: float = 0.0

    @property
    def overhead(self) -> float:
        """Fraction of the time in phases other than training and evaluation, 0 to 1."""
        total = sum(self.seconds.values())
        return 1 - (self.seconds["train"] + self.seconds["evaluate"]) / total if total else 0.0

    def start(self, phase: Phase) -> None:
        """Count time for ``phase`` until the matching ``stop``."""
        self._charge()
        self._active.append(phase)

    def stop(self) -> None:
        """End the innermost phase and resume the enclosing one."""
        self._charge()
        self._active.pop()

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._active:
            self.seconds[self._active[-1]] += now - self._since
        self._since = now


_TIMER: ContextVar[PhaseTimer | None] = ContextVar("timer", default=None)


@contextmanager
def collect_timings() -> Iterator[PhaseTimer]:
    """Collect the times of all ``timed`` blocks that run in this thread inside the context."""
    timer = PhaseTimer()
    token = _TIMER.set(timer)
    try:
        yield timer
    finally:
        _TIMER.reset(token)


@contextmanager
def timed(phase: Phase) -> Iterator[None]:
    """Count the block's time for ``phase``. No effect outside ``collect_timings``."""
    timer = _TIMER.get()
    if timer is None:
        yield
        return
    timer.start(phase)
    try:
        yield
    finally:
        timer.stop()
