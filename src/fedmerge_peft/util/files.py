"""Writing files whole, and directories that one process at a time writes to."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedmerge_peft.errors import RunBusyError, RunError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCKED: ContextVar[frozenset[Path]] = ContextVar("held", default=frozenset())
"""The directories that this thread holds."""


@contextmanager
def translated_write_errors(path: Path) -> Iterator[Path]:
    """Turn what a disk can refuse into one ``RunError`` that names the path."""
    try:
        yield path
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} cannot be written ({reason}); finished rounds are intact. Make room, or choose another --out"
        ) from error


@contextmanager
def locked_directory(path: Path) -> Iterator[None]:
    """Make a directory and hold it, so that no other process takes what is written there for something interrupted.

    Whoever holds it may hold it again. Without a lock where the system or the file system has none.

    Raises:
        RunBusyError: Another process, or another thread, holds it.
        RunError: It cannot be made.
    """
    with translated_write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        whole = path.resolve()
        descriptor = None if fcntl is None or whole in _LOCKED.get() else os.open(path, os.O_RDONLY)
    if descriptor is None:
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunBusyError(
                f"{path} is being written by another process; wait until that has ended, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            pass
        token = _LOCKED.set(_LOCKED.get() | {whole})
        try:
            yield
        finally:
            _LOCKED.reset(token)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a file beside ``path``, then put it in place: the path holds the old file or the new one, whole.

    That holds over a power cut too: the file is on the disk before it takes its name, and its name when this returns.
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
                temporary.unlink(
                    missing_ok=True
                )  # there after a failure, and where both were names of one file already
        if os.name == "posix":  # elsewhere a folder cannot be opened
            _sync(path.parent)


def hardlink(source: Path, path: Path) -> None:
    """Give a file a second name, in place of what has it; a copy where the file system has no links. Raises ``RunError``.

    As files are always replaced as a whole, what is written to one name later does not show under the other.
    """

    def write(temporary: Path) -> None:
        try:
            temporary.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, temporary)

    write_atomically(path, write)


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

    write_atomically(path, write)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, what JSON does not know as text. Raises ``RunError``."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors. Raises ``RunError``."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read what ``write_tensors`` wrote. Raises ``RunError``."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: not readable ({error})") from error
