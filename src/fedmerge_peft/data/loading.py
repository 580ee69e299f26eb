"""Where examples come from: the hub, local files and folders, or the data set that comes with the package.

Nothing here runs code that comes with data, and nothing unpickles.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from glob import escape
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.data.columns import (
    did_you_mean,
    encode_classes,
    join_values,
    matching_rows,
    value_names,
)
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.data import DataRecipe

EMBEDDED = {"support-tickets": "support_tickets.csv"}

# Text such as "None" or "NA" stays text; only an empty cell is missing.
_CSV: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", _CSV | {"sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
_OTHER_FILES = {".arrow", ".gz", ".ndjson", ".pickle", ".pkl", ".txt", ".xls", ".xlsx", ".zip"}
"""Suffixes that no hub id ends in: with one, the path is meant to be a file."""


def load_splits(recipe: DataRecipe) -> dict[str, Dataset]:
    """Read the data that a recipe names, find its splits, and keep the rows that its filter keeps.

    A default split (``validation``, ``test``) is left out where the other evaluation split already is that split, or where the
    filter leaves none of its rows: then a part of the training examples takes its place.

    Returns:
        Data sets under ``train`` (always, never empty), ``validation`` and ``test`` (where there are such splits).

    Raises:
        DataError: The data cannot be found or read; a split or column that the recipe names is absent; the filter leaves no
            training rows, or names a value that no row has.
    """
    with no_progress_bars():
        splits = _read(recipe)
    if recipe.split_column is not None:
        splits = _split_by_column(recipe.split_column, splits)
    chosen = _select_splits(recipe, splits)
    chosen = _filter(recipe, chosen) if recipe.filter else chosen
    if not len(chosen["train"]):
        raise DataError(
            f"data.path: the split {recipe.train_split} of {recipe.path} has no rows; name another with data.train_split=..."
        )
    return chosen


def _read(recipe: DataRecipe) -> dict[str, Dataset]:
    """All splits there are, by their own names. A single table is called ``train``, as ``datasets`` does."""
    if recipe.path.startswith("embedded:"):
        return {"train": _read_embedded(recipe.path.removeprefix("embedded:"))}
    path = Path(recipe.path).expanduser()
    if path.is_file() and path.suffix.lower() not in _READERS:
        raise DataError(
            f"data.path: {path} is not a file this can read; write it as {join_values(_READERS)}, or name a folder or a hub id"
        )
    if not path.exists() and _looks_local(recipe.path):
        raise DataError(
            f"data.path: {path.absolute()} does not exist; write data.path=FILE ({join_values(_READERS)}), data.path=FOLDER, "
            f"a hub id such as data.path=owner/name, or data.path=embedded:{next(iter(EMBEDDED))}"
        )
    try:
        loaded = _read_local(path) if path.exists() else _read_hub(recipe)
    except (
        Exception
    ) as error:  # whatever a reader raises on a broken file, or the network: it is the data's fault
        where = path if path.exists() else f"the hub's data set {recipe.path}"
        raise DataError(f"data.path: {where} cannot be loaded: {_describe_error(error)}") from error
    splits = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    return {name: dataset.with_format(None) for name, dataset in splits.items()}


def _read_embedded(name: str) -> Dataset:
    import pandas
    from datasets import Dataset

    if name not in EMBEDDED:
        raise DataError(
            f"data.path: there is no embedded:{name}{did_you_mean(name, EMBEDDED)}; the package comes with {join_values(EMBEDDED)}"
        )
    with (resources.files("fedmerge_peft.data") / "embedded" / EMBEDDED[name]).open(
        encoding="utf-8"
    ) as file:
        return Dataset.from_pandas(
            pandas.read_csv(file, keep_default_na=False), preserve_index=False
        )


def _read_local(path: Path) -> Any:
    import datasets

    if path.is_file():
        reader, options = _READERS[path.suffix.lower()]
        return datasets.load_dataset(reader, data_files=escape(str(path)), **options)
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(str(path))


def _read_hub(recipe: DataRecipe) -> Any:
    import datasets

    return datasets.load_dataset(recipe.path, recipe.config, revision=recipe.revision)


def _looks_local(path: str) -> bool:
    separators = path.count("/") if os.sep == "/" else path.count("/") + path.count(os.sep)
    return (
        path.startswith((".", "~", "/", os.sep))
        or separators > 1
        or Path(path).suffix.lower() in {*_READERS, *_OTHER_FILES}
    )


def _describe_error(error: BaseException) -> str:
    """One line: what went wrong, without the general words that ``datasets`` wraps around it."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _split_by_column(column: str, splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    if len(splits) > 1:
        raise DataError(
            f"data.split_column: the data come in splits already ({join_values(splits)}); leave data.split_column out"
        )
    (table,) = splits.values()
    numbers, names = encode_classes({"train": table}, column, "data.split_column")
    return {
        name: table.select(np.flatnonzero(numbers["train"] == number))
        for number, name in enumerate(names)
    }


def _select_splits(recipe: DataRecipe, splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Splits under the names of what they are for."""
    asked = {
        "train": recipe.train_split,
        "validation": recipe.validation_split,
        "test": recipe.test_split,
    }
    where = recipe.path if recipe.split_column is None else f"the column {recipe.split_column}"
    for role, name in asked.items():
        if name is not None and name not in splits:
            raise DataError(
                f"data.{role}_split: {where} has no split {name!r}{did_you_mean(name, splits)}; it has {join_values(splits)}"
            )
        if name == recipe.train_split and role != "train":
            raise DataError(
                f"data.{role}_split: {name} is the training split; name another, or leave it out to set a part of it aside"
            )
    for role in ("validation", "test"):
        if asked[role] is None and role in splits and role not in asked.values():
            asked[role] = role
    return {role: splits[name] for role, name in asked.items() if name is not None}


def _filter(recipe: DataRecipe, splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    kept: dict[str, list[Any]] = {split: [] for split in splits}
    for column, wanted in recipe.filter.items():
        key = f"data.filter.{column}"
        values = wanted if isinstance(wanted, list) else [wanted]
        found = set()
        for split, dataset in splits.items():
            rows, occurring = matching_rows(dataset, column, values, key)
            kept[split].append(rows)
            found |= occurring
        absent = [value for value in values if value not in found]
        if absent or not values:
            present = value_names(splits["train"], column, key)
            fault = (
                f"no row has {absent[0]!r}{did_you_mean(absent[0], present)}"
                if absent
                else "the list is empty, so no row is kept"
            )
            raise DataError(f"{key}: {fault}; the column {column} holds {join_values(present)}")
    filtered = {
        split: splits[split].select(reduce(np.intersect1d, rows)) for split, rows in kept.items()
    }
    asked = {
        "train": recipe.train_split,
        "validation": recipe.validation_split,
        "test": recipe.test_split,
    }
    for split, dataset in filtered.items():
        if asked[split] is not None and not len(dataset):
            held = "; ".join(
                f"{column}: {join_values(value_names(splits[split], column, 'data.filter'))}"
                for column in recipe.filter
            )
            raise DataError(
                f"data.filter: it leaves no rows in the split {asked[split]} ({split}), whose columns hold {held}"
            )
    return {split: dataset for split, dataset in filtered.items() if len(dataset)}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Within, ``datasets`` shows none."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
