"""Recognize the files of a run directory, refuse links, and remove interrupted runs."""

from __future__ import annotations

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from fedmerge_peft.errors import RunError
from fedmerge_peft.runs.documents import SCHEMAS
from fedmerge_peft.util.files import translated_write_errors

_DOCUMENTS = "|".join(map(re.escape, sorted({*SCHEMAS, "adapter_config.json"} - {"scores.json"})))
_RUN_FILE = re.compile(
    r"(baselines/[^/]+/)*"
    rf"(recipe\.yaml|metrics\.jsonl|weights/round-\d+\.safetensors|{_DOCUMENTS}"
    r"|(best/)?(soup|weights)\.safetensors|best/scores\.json"
    r"|checkpoint/round-\d+(\.soup)?\.safetensors|tracking/.+)"
)
"""Pattern of all files of a run directory, as paths relative to it."""
_TEMPORARY = re.compile(r"(?<![^/])\.([^/]+)\.\d+$")
"""Pattern of the temporary name of a file that is being written; the group is its final name."""
_TRACKING = re.compile(r"((?:baselines/[^/]+/)*tracking)/.+")
"""Pattern of a tracker's files, as paths relative to the run directory.

The group is the path of the folder ``tracking``.
"""
_DEEPEST = 64
"""Maximum depth of nested folders in a run directory."""
_MAX_LISTED = 5
"""Maximum number of files that a message names."""


def files_in(directory: Path) -> list[Path]:
    """Return all files below a directory; symbolic links count as files and are not followed.

    Raises ``RunError`` if folders are nested more than 64 deep. Runs and trackers do not create
    such folders.
    """
    files, top = [], len(directory.parts)
    for folder, folders, names in os.walk(directory):
        here = Path(folder)
        if len(here.parts) - top > _DEEPEST:  # os.walk recurses in Python 3.11
            raise RunError(
                f"{directory} has folders that are nested more than {_DEEPEST} deep; give the "
                "path of a run directory, or remove the nested folders"
            )
        files += [
            path
            for name in [*folders, *names]
            if (path := here / name).is_symlink() or not path.is_dir()
        ]
    return files


def refuse_links(directory: Path) -> None:
    """Raise ``RunError`` if the directory contains symbolic links or special files, at any depth.

    Symbolic links in an untrusted run directory could cause files elsewhere to be read, overwritten
    or deleted. Those below a folder ``tracking`` are accepted if their targets are below the same
    folder. The directory itself may be a link, because its path comes from the user.
    """
    for path in files_in(directory):
        with suppress(FileNotFoundError):  # another process is writing the run
            if stat.S_ISREG(path.lstat().st_mode) or _is_link_of_tracker(path, directory):
                continue
            kind = f"a link to {path.readlink()}" if path.is_symlink() else "not a regular file"
            raise RunError(
                f"{path} is {kind}; a run directory contains only files and folders. Remove "
                f"{path.name}; if it is a link whose target you trust, replace it by a copy of the "
                "target"
            )


def _is_link_of_tracker(path: Path, directory: Path) -> bool:
    """Return True for a link below ``tracking`` whose target is below the same folder."""
    name = _TRACKING.fullmatch(path.relative_to(directory).as_posix())
    if name is None or not path.is_symlink():
        return False
    try:
        return path.resolve().is_relative_to((directory / name[1]).resolve())
    except (OSError, RuntimeError):  # the links form a loop
        return False


def is_temporary(name: str) -> bool:
    """Return True if a relative path is the temporary name of a file of a run."""
    return bool(_TEMPORARY.search(name)) and bool(_RUN_FILE.fullmatch(_final_name(name)))


def is_run_file(name: str) -> bool:
    """Return True if a relative path names a file of a run."""
    return bool(_RUN_FILE.fullmatch(name))


def is_tracked(name: str) -> bool:
    """Return True if a relative path names a file of an experiment tracker."""
    return bool(_TRACKING.fullmatch(name))


def check_only_run_files(directory: Path) -> None:
    """Raise ``RunError`` if the directory has files, at any depth, that do not belong to a run."""
    names = (path.relative_to(directory).as_posix() for path in files_in(directory))
    if others := sorted(name for name in names if not _RUN_FILE.fullmatch(_final_name(name))):
        more = f", and {len(others) - _MAX_LISTED} more" if len(others) > _MAX_LISTED else ""
        raise RunError(
            f"{directory} contains an unfinished run and files that do not belong to a run: "
            f"{', '.join(others[:_MAX_LISTED])}{more}. Move them, or choose another --out"
        )


def remove_run(directory: Path) -> None:
    """Remove all files and folders of an interrupted run, but not the directory itself.

    The recipe is removed last, so that an interrupted removal can be repeated.

    Raises:
        RunError: The directory also has files that do not belong to a run, and nothing was removed;
            or a file cannot be removed.
    """
    check_only_run_files(directory)
    recipe = directory / "recipe.yaml"
    with translated_write_errors(directory):
        for file in sorted(files_in(directory), key=lambda path: path == recipe):
            file.unlink()
        for folder, _, _ in os.walk(directory, topdown=False):
            if Path(folder) != directory:
                Path(folder).rmdir()


def remove_temporary_files(directory: Path) -> None:
    """Remove files that were being written when the run was interrupted.

    Raises ``RunError`` if a file cannot be removed.
    """
    with translated_write_errors(directory):
        for path in files_in(directory):
            if is_temporary(path.relative_to(directory).as_posix()):
                path.unlink()


def _final_name(name: str) -> str:
    return _TEMPORARY.sub(r"\1", name)
