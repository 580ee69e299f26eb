"""Available memory of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_LIMIT = Path("/sys/fs/cgroup/memory.max")


def available_memory() -> int:
    """Return the bytes of available memory, at most a container's limit.

    On systems without ``/proc``, all of the machine's memory counts as available.
    """
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path, pattern, unit in (
        (_MEMINFO, r"MemAvailable:\s*(\d+) kB", 1024),
        (_LIMIT, r"(\d+)", 1),
    ):
        try:
            match = re.search(pattern, path.read_text())
        except OSError:
            continue
        if match:
            bounds.append(int(match[1]) * unit)
    return min(bounds)


def shortage(numbers: int) -> str | None:
    """Return the reason why ``numbers`` float32 values do not fit into memory; None if they do."""
    needed, available = 4 * numbers, available_memory()
    if needed <= available:
        return None
    return f"need {needed / 1e9:,.1f} GB of memory, but {available / 1e9:,.1f} GB are available"
