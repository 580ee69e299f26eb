"""Cache of values that are read from files; a file that has changed is read again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Version = tuple[int, int, int]
"""Inode, size in bytes, and time of the last modification in nanoseconds."""


class CachedFiles:
    """Cache of one value per file. Callers must not change the values."""

    def __init__(self) -> None:
        self._values: dict[Path, tuple[Version, Any]] = {}

    def get(self, path: Path, read: Callable[[Path], Any]) -> Any:
        """Return ``read(path)``, cached until the file changes.

        While the file is missing, each call calls ``read``.
        """
        version = _version(path)
        known = self._values.get(path)
        if version is not None and known is not None and known[0] == version:
            return known[1]
        value = read(path)
        if version is not None:
            self._values[path] = (version, value)
        return value


def _version(path: Path) -> Version | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns
