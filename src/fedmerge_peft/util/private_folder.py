"""Folders that only their user may read or write."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path


def make_private(folder: Path) -> None:
    """Create a folder of mode 0700, or revoke other users' access to an existing folder.

    Raises:
        OSError: The folder is a link, belongs to another user, or cannot be created.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(mode=0o700, exist_ok=True)
    if os.name != "posix":  # the mode does not control access
        return
    if not is_own(folder):
        raise PermissionError(errno.EPERM, "it is a link, or belongs to another user")
    if stat.S_IMODE(folder.lstat().st_mode) & 0o077:
        folder.chmod(0o700)


def is_own(path: Path) -> bool:
    """Return True for a file or folder of this user that is not a link.

    The owner is checked on POSIX systems only.

    Raises:
        OSError: The path does not exist, or cannot be examined.
    """
    facts = path.lstat()
    if not (stat.S_ISREG(facts.st_mode) or stat.S_ISDIR(facts.st_mode)):
        return False
    return os.name != "posix" or facts.st_uid == os.geteuid()
