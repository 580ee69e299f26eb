"""Writing files whole, and directories that one process at a time writes to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import lock_descriptor
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge_peft.errors import RunBusyError, RunError

_HELD: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""The directories that this thread holds."""


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Turn what a disk can refuse into one ``RunError`` that names the path."""
    try:
        yield path
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} cannot be written ({reason}); finished rounds are intact. Make room, or choose another --out"
        ) from error


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Make a directory and hold it, so that no other process takes what is written there for something interrupted.

    Whoever holds it may hold it again. Without a lock where the system or the file system has none.

    Raises:
        RunBusyError: Another process, or another thread, holds it.
        RunError: It cannot be made.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        whole = path.resolve()
        posix = os.name == "posix"  # elsewhere a folder cannot be opened
        descriptor = os.open(path, os.O_RDONLY) if posix and whole not in _HELD.get() else None
    if descriptor is None:
        yield
        return
    try:
        with suppress(OSError):  # a file system without locks
            if not lock_descriptor(descriptor, blocking=False):
                raise RunBusyError(
                    f"{path} is being written by another process; wait until that has ended, or choose another --out"
                )
        token = _HELD.set(_HELD.get() | {whole})
        try:
            yield
        finally:
            _HELD.reset(token)
    finally:
        os.close(descriptor)


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: the path holds the old file or the new one, whole.

    That holds over a power cut too: the file is on the disk before it takes its name, and its name when this returns.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with writing(path):
        try:
            temporary.unlink(missing_ok=True)
            write(temporary)
            _sync(temporary)
            temporary.replace(path)
        finally:
            with suppress(OSError):
                temporary.unlink(
                    missing_ok=True
                )  # there after a failure, and where both were names of one file already
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent)


def link(source: Path, path: Path) -> None:
    """Give a file a second name, in place of what has it; a copy where the file system has no links. Raises ``RunError``.

    As files are always replaced as a whole, what is written to one name later does not show under the other.
    """

    def write(temporary: Path) -> None:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)

    atomically(path, write)


def _sync(path: Path) -> None:
    """Have the system write to the disk what it keeps of a file, or of a folder's names."""
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. Raises ``RunError``."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, what JSON does not know as text. Raises ``RunError``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: tuple[str, str] = ("format", "pt")
) -> None:
    """Write tensors as safetensors; the same content gives the same bytes.

    Args:
        path: Its file.
        tensors: By name.
        metadata: One key and its text. safetensors writes several keys in any order.

    Raises:
        RunError: It cannot be written.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # the umask's; safetensors makes files for the owner alone
        save_file(whole, temporary, metadata=dict([metadata]))
        temporary.chmod(mode)

    atomically(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what ``write_tensors`` wrote. Raises ``RunError``."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not readable ({error})") from error
