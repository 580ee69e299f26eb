"""Workarounds for two bugs in NVIDIA FLARE 2.9.0."""

from __future__ import annotations

from typing import Any

from nvflare.fuel.utils.buffer_list import ConsumableBufferList


class UniqueList(list[Any]):
    """List that ignores objects it already contains; it replaces FLARE's ``Task.client_tasks``.

    When FLARE sends a task to a site again, it appends the same ``ClientTask`` to the list a second
    time. If the list keeps both, FLARE's monitor crashes at the end of the task.
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
