"""A process that ends with its parent, so that killing one of ours leaves none of the others behind."""

from __future__ import annotations

import os
import threading
import time

_EVERY = 0.5
"""Seconds between two looks."""


def end_with_parent() -> None:
    """From now on, end this process, without ado, as soon as the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_EVERY)
        os._exit(1)

    threading.Thread(target=watch, name="fedmerge-parent", daemon=True).start()
