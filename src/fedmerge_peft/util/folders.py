"""Folders that are written whole or not at all, with the SHA-256 sums of their files.

The sums are in ``SHA256SUMS``, in the format of ``sha256sum``. If a subfolder has its own
``SHA256SUMS``, the outer ``SHA256SUMS`` lists that file, but no other file of the subfolder. A copy
of the subfolder alone can therefore be verified, too.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import file_digest, sha256
from pathlib import Path

from fedmerge_peft.errors import RunError
from fedmerge_peft.util.files import locked_directory, translated_write_errors, write_text

SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Write a folder so that it has all of its files or none.

    The context yields a temporary folder next to ``folder``. At the end, it adds ``SHA256SUMS`` and
    renames the temporary folder. Remains of an earlier process that was killed are removed.

    Args:
        folder: A new or empty folder.

    Raises:
        RunBusyError: Another process is writing the same folder.
        RunError: The folder cannot be written. Errors of the context name ``folder`` in place of
            the temporary folder.
    """
    target = folder.resolve()
    short = sha256(os.fsencode(target.name)).hexdigest()[:16]  # a longer name may be invalid
    partial = target.with_name(f".{short}.partial")
    with translated_write_errors(folder):
        if partial.is_symlink():
            partial.unlink()
    with locked_directory(partial, folder):
        try:
            with translated_write_errors(folder):
                _clear(partial)
                yield partial
                write_sums(partial)
                if target.exists():
                    target.rmdir()
                partial.rename(target)
        except BaseException as error:
            shutil.rmtree(partial, ignore_errors=True)
            if isinstance(error, RunError):
                error.args = (str(error).replace(str(partial), str(folder)),)
            raise


def write_sums(folder: Path) -> None:
    """Write a folder's ``SHA256SUMS``. Raise ``RunError`` on failure."""
    sums = {name: _digest(folder / name) for name in _covered(folder)}
    if unread := [name for name, digest in sums.items() if digest is None]:
        raise RunError(f"{folder / unread[0]} cannot be read; write the folder again")
    lines = [f"{digest}  {name}\n" for name, digest in sums.items()]
    write_text(folder / SUMS, "".join(lines))


def faults(folder: Path) -> list[str]:
    """Return a sentence for each difference between a folder and the sums in it, at any depth.

    The folder may come from an untrusted source, so links and special files are not opened.
    """
    problems: list[str] = []
    folders = [folder]
    while folders:
        faulty, inner = _faults_of(folders.pop())
        problems += faulty
        folders += reversed(inner)
    return problems


def _faults_of(folder: Path) -> tuple[list[str], list[Path]]:
    """Return the faults of one folder, and the subfolders whose own sums remain to be checked."""
    path = folder / SUMS
    if path.is_symlink() or not path.is_file():
        return [f"{path} is missing"], []
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError:
        return [f"{path} is damaged: it is not UTF-8"], []
    except OSError:
        return [f"{path} cannot be read"], []
    problems, listed, inner = [], {}, []
    for number, line in enumerate(lines, 1):
        if match := _LINE.fullmatch(line):
            listed[match[2]] = match[1]
        else:
            problems.append(f"{path}:{number} is damaged: it is not a SHA-256 sum with a name")
    present = _covered(folder)
    problems += [f"{folder / name} is missing" for name in sorted(listed.keys() - set(present))]
    for name in present:
        if (folder / name).is_symlink():
            problems.append(f"{folder / name} is a link")
        elif not (folder / name).is_file():
            problems.append(f"{folder / name} is not a regular file")
        elif name not in listed:
            problems.append(f"{folder / name} is not listed in {path}")
        elif (digest := _digest(folder / name)) is None:
            problems.append(f"{folder / name} cannot be read")
        elif listed[name] != digest:
            problems.append(
                f"{folder / name} is damaged: its SHA-256 sum differs from the one in {path}"
            )
        elif name.endswith(f"/{SUMS}"):
            inner.append((folder / name).parent)
    return problems, inner


def _covered(folder: Path) -> list[str]:
    """Return the files that the sums of a folder cover, as paths relative to it."""
    names: list[str] = []
    for parent, folders, files in os.walk(folder):
        here = Path(parent)
        inner = here != folder and SUMS in files
        links = [name for name in folders if (here / name).is_symlink()]
        names += [
            (here / name).relative_to(folder).as_posix()
            for name in ([SUMS] if inner else [*files, *links])
            if inner or (here, name) != (folder, SUMS)
        ]
        folders[:] = [] if inner else sorted(folders)
    return sorted(names)


def _digest(path: Path) -> str | None:
    """Return the SHA-256 sum of a file; None if it cannot be read."""
    try:
        with path.open("rb") as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
