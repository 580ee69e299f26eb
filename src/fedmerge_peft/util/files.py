"""Atomic writes of files, and directories that one process at a time may write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from filelock import lock_descriptor
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from fedmerge_peft.errors import RunBusyError, RunError
from fedmerge_peft.util import strict_json
from fedmerge_peft.util.row_storage import byte_chunks, on_disk
from fedmerge_peft.util.text import reason

_LOCKED: ContextVar[frozenset[Path]] = ContextVar("locked", default=frozenset())
"""Directories that this thread has locked."""
_SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.bool: "BOOL",
}
"""Names of number formats in safetensors files."""


@contextmanager
def translated_write_errors(path: Path) -> Iterator[Path]:
    """Convert file system errors inside the context to a ``RunError`` that names ``path``."""
    try:
        yield path
    except (OSError, SafetensorError) as error:
        raise RunError(
            f"{path} cannot be written ({reason(error)}); finished rounds of a run are intact. "
            "Check disk space and permissions, or write to another folder"
        ) from error


@contextmanager
def locked_directory(path: Path, named: Path | None = None) -> Iterator[None]:
    """Create a directory, and lock it against other processes and threads inside the context.

    The lock is reentrant. If the operating system or the file system does not support locks, the
    directory is not locked.

    Args:
        path: Directory.
        named: Path that errors name in its place; None for ``path``.

    Raises:
        RunBusyError: Another process or thread has locked the directory.
        RunError: The directory cannot be created or opened.
    """
    named = named or path
    with translated_write_errors(named):
        path.mkdir(parents=True, exist_ok=True)
        resolved = path.resolve()
        posix = os.name == "posix"  # other systems cannot open a folder
        locked = resolved in _LOCKED.get()
        descriptor = os.open(path, os.O_RDONLY) if posix and not locked else None
    if descriptor is None:
        yield
        return
    try:
        with suppress(OSError):  # the file system does not support locks
            if not lock_descriptor(descriptor, blocking=False):
                raise RunBusyError(
                    f"{named} is being written by another process or thread; wait until it ends, "
                    "or write to another folder"
                )
        token = _LOCKED.set(_LOCKED.get() | {resolved})
        try:
            yield
        finally:
            _LOCKED.reset(token)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that ``path`` always contains the complete old or the complete new file.

    ``write`` writes a temporary file in the same folder, which then replaces ``path``. The file is
    flushed to disk before it is renamed, and the folder afterwards, so the guarantee also holds
    after a power failure.

    Args:
        path: File.
        write: Function that is called with the path of the temporary file, and writes it.

    Raises:
        RunError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with translated_write_errors(path):
        try:
            temporary.unlink(missing_ok=True)
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                # The temporary file remains after a failure. It also remains if it and ``path`` are
                # hard links to the same file, because renaming then does nothing.
                temporary.unlink(missing_ok=True)
        if os.name == "posix":  # other systems cannot open a folder
            _sync(path.parent)


def hardlink(source: Path, path: Path) -> None:
    """Create ``path`` as a hard link to ``source``, or as a copy if links are not supported.

    Because writes replace files, a later write to one path does not change the other.

    Raises:
        RunError: The file cannot be written.
    """

    def write(temporary: Path) -> None:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(path, write)


def _sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically. Raise ``RunError`` on failure."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically. Raise ``RunError`` on failure.

    NaN becomes null. Infinity and values of types that JSON lacks become text.
    """
    write_text(path, strict_json.dumps(value, indent=2) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] = ("format", "pt")
) -> None:
    """Write a safetensors file atomically. The same content results in the same bytes.

    Args:
        path: File.
        tensors: Tensors by name.
        metadata: A single key and its value, as safetensors does not fix the order of several keys.

    Raises:
        RunError: The file cannot be written.
    """
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # from the umask; safetensors would use 0600
        if any(map(on_disk, stored.values())):
            _write_in_chunks(temporary, stored, metadata)
        else:
            save_file(stored, temporary, metadata=dict([metadata]))
        temporary.chmod(mode)

    write_atomically(path, write)


def _write_in_chunks(path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str]) -> None:
    """Write the same bytes as ``save_file``, without reading whole tensors into memory."""
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict([metadata])}
    end = 0
    for name, tensor in ordered:
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            for part in byte_chunks(tensor):
                file.write(part)
