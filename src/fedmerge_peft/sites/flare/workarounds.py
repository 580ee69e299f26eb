"""Workarounds for two bugs in NVIDIA FLARE 2.9.0."""

from __future__ import annotations

from typing import Any

from nvflare.fuel.utils.buffer_list import ConsumableBufferList


class UniqueList(list[Any]):
    """List that ignores objects it already contains.

    When FLARE sends a task again, it appends the task to this list a second time. FLARE's monitor
    then crashes at the end of the task.
    """

    def append(self, item: Any) -> None:
        """Append an object unless the list contains it."""
        if not any(item is known for known in self):
            super().append(item)


def disable_payload_repr() -> None:
    """Stop FLARE from formatting the bytes of each incoming message for its debug log.

    FLARE formats them even if the log is off: 400 MB of text for a message of 100 MB.
    """
    ConsumableBufferList.__repr__ = object.__repr__
