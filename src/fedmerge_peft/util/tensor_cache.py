"""Cache of tensors on disk, which processes and runs share."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedmerge_peft.util.private_folder import is_own, make_private
from fedmerge_peft.util.stateful import describe
from fedmerge_peft.util.text import reason

log = logging.getLogger(__name__)

_TENSOR, _SUM = "tensor", "blake2b"
_RESERVE = 10**9
"""Bytes of the disk that the cache leaves free."""
_SMALL = 2**20
"""Limit in bytes. Smaller tensors are copied into memory, because a process can have only a limited
number of memory mappings."""
_RESCANS = 20
"""Number of times that the folder is listed while ``max_bytes`` bytes are written. A listing finds
the files that other processes wrote."""


def cache_folder() -> Path:
    """Return the folder of all caches.

    It is the folder in the environment variable ``FEDMERGE_CACHE`` or, without this variable, the
    subfolder ``fedmerge-peft`` of ``XDG_CACHE_HOME`` or of ``~/.cache``.

    Raises:
        RuntimeError: Neither variable is set, and the user has no home directory.
    """
    if own := os.environ.get("FEDMERGE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedmerge-peft"


class TensorCache:
    """Tensors by key, one safetensors file each, with a checksum that every read verifies.

    Files are written under another name and renamed, so that processes can read and write at the
    same time. A damaged file counts as missing. The least recently used files are removed to stay
    within the limit, except files that this object has read or written. Only the user may open the
    folder and its files, because tensors can reveal examples, and a file of another user could
    change results. A folder or a file that is a link or belongs to another user is not used. A
    failure to write is logged, and nothing is written afterwards.

    Args:
        folder: Folder, created on the first write with mode 0700.
        max_bytes: Limit on the bytes of all files.
    """

    def __init__(self, folder: Path, max_bytes: float) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._writes = True
        self._private: bool | None = None
        """True if only this user can open the folder; None before it is checked."""
        self._used: set[str] = set()
        """Names of the files that this object has read or written."""
        self._total: int | None = None
        """Bytes of all files, as far as known; None before the first write."""
        self._unscanned = 0
        """Bytes written since the folder was last listed."""

    def get(self, key: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """Return a tensor on the CPU, memory-mapped if it is large; None if it is not in the cache.

        Args:
            key: Letters and digits.
            shape: Shape that the tensor must have.
            dtype: Data type that the tensor must have.
        """
        if not self._is_private():
            return None
        path = self._path(key)
        try:
            if not is_own(path):
                self._discard(path, "it is a link, or belongs to another user")
                return None
            with safe_open(path, "pt") as file:
                tensor: Tensor = file.get_tensor(_TENSOR)
                expected = (file.metadata() or {}).get(_SUM)
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError) as error:
            self._discard(path, reason(error))
            return None
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype:
            wanted = f"{str(dtype).removeprefix('torch.')} {tuple(shape)}"
            self._discard(path, f"it contains {describe(tensor)}, expected {wanted}")
            return None
        if _checksum(tensor) != expected:
            self._discard(path, "its checksum differs")
            return None
        with suppress(OSError):  # a folder that cannot be written
            os.utime(path)
        self._used.add(path.name)
        return tensor.clone() if tensor.nbytes < _SMALL else tensor

    def put(self, key: str, tensor: Tensor) -> None:
        """Store a tensor, unless it or an earlier one found no room, or an earlier write failed."""
        if not self._writes or not self._is_private(create=True):
            return
        stored = tensor.detach().cpu().contiguous()
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
        try:
            if not self._has_room(stored.nbytes):
                self._writes = False
                log.info(
                    "the cache %s has reached its limit, or its disk is full, so nothing more is "
                    "stored in it",
                    self.folder,
                )
                return
            try:
                save_file({_TENSOR: stored}, temporary, metadata={_SUM: _checksum(stored)})
                temporary.chmod(0o600)
                temporary.replace(path)
            finally:
                with suppress(OSError):
                    temporary.unlink(missing_ok=True)
        except (OSError, SafetensorError) as error:
            self._give_up(error)
            return
        self._used.add(path.name)
        self._total = (self._total or 0) + stored.nbytes
        self._unscanned += stored.nbytes

    def _is_private(self, *, create: bool = False) -> bool:
        """Return True if the folder exists and only this user can open it.

        The first result for an existing folder is kept. ``create`` creates a missing folder first.
        """
        if self._private is None and (create or self.folder.exists()):
            try:
                make_private(self.folder)
            except OSError as error:
                self._give_up(error)
            self._private = self._writes
        return bool(self._private)

    def _give_up(self, error: Exception) -> None:
        self._writes = False
        log.warning(
            "the cache %s cannot be written, so nothing more is stored in it: %s; set "
            "FEDMERGE_CACHE to another folder",
            self.folder,
            reason(error),
        )

    def _path(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"

    def _discard(self, path: Path, fault: str) -> None:
        log.warning("%s is damaged or not trusted, and will be replaced: %s", path, fault)
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def _has_room(self, size: int) -> bool:
        """Return True if ``size`` more bytes fit, after the removal of files if necessary."""
        if shutil.disk_usage(self.folder).free < size + _RESERVE:
            return False
        stale = self._total is None or self._unscanned > self._max_bytes / _RESCANS
        if not stale and (self._total or 0) + size <= self._max_bytes:
            return True
        files = []
        for path in self.folder.iterdir():
            with suppress(OSError):  # another process has removed it
                facts = path.stat()
                files.append((facts.st_mtime, facts.st_size, path))
        total = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if total + size <= self._max_bytes:
                break
            if path.name not in self._used:
                with suppress(OSError):
                    path.unlink(missing_ok=True)
                    total -= length
        self._total, self._unscanned = total, 0
        return total + size <= self._max_bytes


def _checksum(tensor: Tensor) -> str:
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return blake2b(data.data, digest_size=16).hexdigest()
