"""Child processes that exit when their parent does, so that a killed parent leaves none behind."""

from __future__ import annotations

import os
import threading
import time

_INTERVAL = 0.5
"""Seconds between two checks."""


def exit_with_parent() -> None:
    """Start a thread that ends this process at once when its parent process is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
        os._exit(1)

    threading.Thread(target=watch, name="fedmerge-parent", daemon=True).start()
