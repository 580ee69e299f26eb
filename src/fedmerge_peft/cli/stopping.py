"""Stop a run between two rounds on SIGINT or SIGTERM, and at once on a second signal."""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any

from fedmerge_peft.distributed import is_main


class Stopped(KeyboardInterrupt):
    """A signal stopped the run. ``code`` is the exit code, 128 + signal number (130 or 143)."""

    def __init__(self, number: int) -> None:
        self.code = 128 + number
        super().__init__(number)


class Stop:
    """Context that defers the first SIGINT or SIGTERM until the next call of ``check``.

    A second signal takes effect immediately. Both raise ``Stopped``. ``arm`` installs the signal
    handlers, and leaving the context restores the previous ones.

    Args:
        announced: True to print a line for the first signal.
    """

    def __init__(self, announced: bool = True) -> None:
        self._announced = announced
        self.requested: int | None = None
        """Number of the first signal; None before it."""
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def arm(self) -> None:
        """Install the signal handlers."""
        if not self._previous:
            self._previous = {
                number: signal.signal(number, self._handle)
                for number in (signal.SIGINT, signal.SIGTERM)
            }

    def check(self) -> None:
        """Raise ``Stopped`` if a signal has arrived. Call this where the run may stop."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None:
            raise Stopped(number)
        self.requested = number
        if self._announced and is_main():
            with suppress(OSError):  # not print: the signal may have interrupted a print
                os.write(2, b"\nstopping after this round; repeat to stop now\n")
