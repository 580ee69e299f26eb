"""Where the time of a run goes: what is marked as ``spent`` on something, while somebody is ``timing``."""

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
    """Seconds of wall time by phase; each moment counts for the innermost phase that it is spent on."""

    seconds: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(get_args(Phase), 0.0))
    _active: list[Phase] = field(default_factory=list)
    _since: float = 0.0

    @property
    def overhead(self) -> float:
        """The share of the time that is neither training nor evaluation, 0 to 1."""
        total = sum(self.seconds.values())
        return 1 - (self.seconds["train"] + self.seconds["evaluate"]) / total if total else 0.0

    def start(self, phase: Phase) -> None:
        """From now on time is spent on this phase."""
        self._charge()
        self._active.append(phase)

    def stop(self) -> None:
        """From now on time is spent on what it was before ``start``."""
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
    """Within, what is marked is counted, in this thread."""
    timer = PhaseTimer()
    token = _TIMER.set(timer)
    try:
        yield timer
    finally:
        _TIMER.reset(token)


@contextmanager
def timed(phase: Phase) -> Iterator[None]:
    """Mark time as spent on this phase; does nothing where nobody is timing."""
    timer = _TIMER.get()
    if timer is None:
        yield
        return
    timer.start(phase)
    try:
        yield
    finally:
        timer.stop()
