"""Stopping a run between two rounds: Ctrl-C and SIGTERM wait for the round's end, the second of them does not."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from fedmerge_peft.distributed import is_main


class Stopped(KeyboardInterrupt):
    """Somebody asked to stop. ``code`` is the exit code, 128 and the signal's number: 130 or 143."""

    def __init__(self, rank: int) -> None:
        self.code = 128 + rank
        super().__init__(rank)


class Stop:
    """While a block runs, from ``arm`` on, the first SIGINT or SIGTERM is remembered until ``check``; the second raises ``Stopped``.

    Before ``arm`` there is nothing to wait for, and SIGTERM and SIGINT do what they did before the block.
    """

    def __init__(self) -> None:
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for rank, handler in self._before.items():
            signal.signal(rank, handler)

    def arm(self) -> None:
        """Begin to catch the signals."""
        if not self._before:
            self._before = {
                rank: signal.signal(rank, self._hear) for rank in (signal.SIGINT, signal.SIGTERM)
            }

    def check(self) -> None:
        """To be called where it is safe to stop. Raises ``Stopped`` if somebody has asked to."""
        if self.asked is not None:
            raise Stopped(self.asked)

    def _hear(self, rank: int, _: FrameType | None) -> None:
        if self.asked is not None:
            raise Stopped(rank)
        self.asked = rank
        if is_main():
            with suppress(OSError):  # by no print, as this may have interrupted one
                os.write(2, b"\nstopping after this round; once more to stop at once\n")
