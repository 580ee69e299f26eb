"""Files of a folder: their splits, and the labels of images and audio."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError

_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLIT_OF = {name: split for split, names in _SPLITS.items() for name in names}

Splits = dict[str, list[Path]]


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, and follow links.

    The files of a folder precede those of its subfolders; both are sorted by name. Hidden files,
    hidden folders and folders whose names begin with ``__`` are skipped.
    """
    visited = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(parent)
        if real in visited:  # a link led to this folder before
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def split_tables(folder: Path, files: Sequence[Path]) -> Splits:
    """Assign tables to splits by the names of the files and folders directly in a folder.

    If every name begins or ends with the name of a split (``train.csv``, ``test/``,
    ``tickets_train.csv``, ``train-00000-of-00002.parquet``), the names determine the splits.
    Otherwise, the same rule is applied within each subfolder (``en/train.csv``, ``de/train.csv``),
    unless one of the names is simply that of the training split. If this leads to no evaluation
    split, all files form the training split. If all tables lie in one subfolder whose name does not
    end with that of a split, these rules are applied to the subfolder instead of the folder.

    Raises:
        DataError: Some names are those of splits, but others are not, and the former include the
            plain name of an evaluation split, such as ``test.csv``, or names that end with the
            training split and names that end with an evaluation split. Or a subfolder contains an
            evaluation split, but another file or subfolder is without splits.
    """
    return _split_within(folder, files) or {"train": list(files)}


def _split_within(folder: Path, files: Sequence[Path]) -> Splits | None:
    """Return the files by split, or None if their names do not define splits."""
    while len(entries := _by_entry(folder, files)) == 1:
        (entry,) = entries
        if not (folder / entry).is_dir() or _words(entry)[-1] in _SPLIT_OF:
            break
        folder /= entry
    words = {entry: _words(entry) for entry in entries}
    splits = {
        entry: _SPLIT_OF[name]
        for entry, (*_, last) in words.items()
        if (name := last if last in _SPLIT_OF else words[entry][0]) in _SPLIT_OF
    }
    if len(splits) == len(entries):
        return _collect(entries, splits)
    # A first word alone is not evidence: train-station.csv.
    named = {
        entry: _SPLIT_OF[words[entry][-1]] for entry in splits if words[entry][-1] in _SPLIT_OF
    }
    exact = {entry: split for entry, split in named.items() if len(words[entry]) == 1}
    if set(exact.values()) - {"train"} or {"train"} < set(named.values()):
        _reject_mixed_names(folder, named, entries)
    return None if exact else _merged(folder, entries)


def _merged(folder: Path, entries: Mapping[str, Sequence[Path]]) -> Splits | None:
    """Join the splits of the subfolders; return None if none of them has an evaluation split.

    Raises:
        DataError: A subfolder has an evaluation split, but another file or subfolder has no splits.
    """
    within = {
        entry: (_split_within(folder / entry, files) if (folder / entry).is_dir() else None)
        for entry, files in entries.items()
    }
    known = {entry: splits for entry, splits in within.items() if splits}
    if not any(splits.keys() - {"train"} for splits in known.values()):
        return None
    if rest := [entry for entry in entries if entry not in known]:
        raise DataError(
            f"data.path: {folder} has files that are named as splits in {join_values(known, 5)}, "
            f"but not in {join_values(rest, 5)}; put all tables into subfolders and name them "
            "there as splits (train, validation, test), or name none of them as a split"
        )
    merged = {
        split: [path for splits in known.values() for path in splits.get(split, ())]
        for split in _SPLITS
    }
    return {split: paths for split, paths in merged.items() if paths}


def split_media(folder: Path, files: Sequence[Path]) -> Splits:
    """Assign images or audio to splits if they all lie in subfolders that are named as splits.

    Otherwise, all files form the training split.

    Raises:
        DataError: There are subfolders named as the training split and as an evaluation split, but
            other files or folders are not named as splits.
    """
    entries = _by_entry(folder, files)
    splits = {
        entry: _SPLIT_OF[entry.lower()]
        for entry in entries
        if entry.lower() in _SPLIT_OF and (folder / entry).is_dir()
    }
    if len(splits) == len(entries):
        return _collect(entries, splits)
    if {"train"} < set(splits.values()):
        _reject_mixed_names(folder, splits, entries)
    return {"train": list(files)}


def media_labels(folder: Path, splits: Mapping[str, Sequence[Path]]) -> dict[str, list[str]]:
    """Return, for each split, the labels of its files: the names of their folders.

    Raises:
        DataError: Files lie at different depths, or outside a folder that is named by a label.
    """
    files = [path for paths in splits.values() for path in paths]
    tops = {path.relative_to(folder).parts[0].lower() for path in files}
    levels = 1 if tops <= _SPLIT_OF.keys() else 0
    depths = {len(path.relative_to(folder).parts) - levels: path for path in files}
    if len(depths) > 1:
        raise DataError(
            f"data.path: files lie at different depths ({join_values(depths.values(), 3)}); put "
            "each into a folder that is named by its label"
        )
    if 1 in depths:
        raise DataError(
            f"data.path: the files in {folder}, such as {depths[1]}, have no labels; put each "
            "into a folder that is named by its label, or add a metadata.csv with the columns "
            "file_name and label"
        )
    return {split: [path.parent.name for path in paths] for split, paths in splits.items()}


def _by_entry(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    """Group files by the first part of their path relative to the folder."""
    entries: dict[str, list[Path]] = {}
    for path in files:
        entries.setdefault(path.relative_to(folder).parts[0], []).append(path)
    return entries


def _words(entry: str) -> list[str]:
    """Return the words of a name in lower case, without suffix and ``-00000-of-00002``."""
    words = entry.partition(".")[0].lower().replace("-", "_").split("_")
    while len(words) > 1 and (words[-1].isdecimal() or words[-1] == "of"):
        words.pop()
    return words


def _collect(entries: Mapping[str, Sequence[Path]], splits: Mapping[str, str]) -> Splits:
    parts = {
        split: [
            path for entry, files in entries.items() if splits[entry] == split for path in files
        ]
        for split in _SPLITS
    }
    return {split: files for split, files in parts.items() if files}


def _reject_mixed_names(
    folder: Path, splits: Mapping[str, str], entries: Mapping[str, object]
) -> None:
    rest = [entry for entry in entries if entry not in splits]
    raise DataError(
        f"data.path: {folder} has names of splits ({join_values(splits, 5)}) and other names "
        f"({join_values(rest, 5)}); name all files or folders as splits (train, validation, test), "
        "or none"
    )


def _raise(error: OSError) -> None:
    raise error
