"""Load examples from the hub, from local files and folders, or from embedded data sets.

Loading never runs code from a data set and never unpickles data.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.data.client_files import is_pattern, read_clients
from fedmerge_peft.data.columns import (
    did_you_mean,
    encode_classes,
    join_values,
    matching_rows,
    value_names,
)
from fedmerge_peft.data.local_files import read_hub, read_local
from fedmerge_peft.data.tables import TABLES, is_table
from fedmerge_peft.data.text_files import COMPRESSIONS
from fedmerge_peft.errors import DataError
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.data import DataRecipe

logger = logging.getLogger(__name__)

EMBEDDED = {
    "support-tickets": "support_tickets.csv",
    "ticket-subjects": "ticket_subjects.csv",
    "assistants": "assistants.jsonl",
}
IN_MEMORY = "memory"
"""Start of ``data.path`` if a Python program passes the examples: ``memory:FINGERPRINT``."""

_OTHER_FILES = {*COMPRESSIONS, ".pickle", ".pkl", ".txt", ".xls", ".xlsx", ".zip"}
"""Suffixes that, besides those of tables, mark a path as a local file instead of a hub id."""


def load_splits(
    recipe: DataRecipe,
    media: str | None = None,
    splits: Mapping[str, Dataset] | None = None,
) -> dict[str, Dataset]:
    """Load the data of a recipe, select its splits, and apply its filter.

    If the recipe names no validation split, the data's split ``validation`` is used, if there is
    one. It is not used if the recipe names it as another split, or if the filter removes all of its
    rows. The same holds for ``test``. If the result lacks one of these splits, ``federate_data``
    replaces the split by a fraction of the training examples.

    Args:
        recipe: Source of the examples.
        media: Column with images or audio. A relative path in this column is resolved against the
            folder of the table if it leads to a file there.
        splits: Splits in memory, instead of those at ``recipe.path``.

    Returns:
        Data sets by split: ``train``, which is never empty, and ``validation`` and ``test`` if they
        exist.

    Raises:
        DataError: The data do not exist or cannot be read; a split or column of the recipe does not
            exist; the training split is also an evaluation split, or has no rows; the recipe names
            a ``split_column``, but the data already have several splits, or its values are
            missing or differ only in case; the filter removes all rows of a split that the recipe
            names, or names a value that does not occur.
    """
    if splits is None:
        with no_progress_bars():
            splits = _read(recipe, media)
    if recipe.split_column is not None:
        splits = _split_by_column(recipe.split_column, splits)
    chosen = _select_splits(recipe, splits)
    chosen = _filter(recipe, chosen) if recipe.filter else chosen
    if not len(chosen["train"]):
        columns = join_values(chosen["train"].column_names, 5) or "none"
        several = len(splits) > 1
        part = f"the split {recipe.train_split} of " if several else ""
        remedy = ", or name another split in data.train_split" if several else ""
        key = "data" if is_in_memory(recipe.path) else "data.path"
        raise DataError(
            f"{key}: {part}{_source(recipe)} has no "
            f"rows (its columns: {shortened(columns, 120)}); add some{remedy}"
        )
    return chosen


def is_in_memory(path: str) -> bool:
    """Return True if ``data.path`` stands for data that a Python program passed."""
    return path.partition(":")[0] == IN_MEMORY


def _source(recipe: DataRecipe) -> str:
    return "the data set in memory" if is_in_memory(recipe.path) else recipe.path


def _read(recipe: DataRecipe, media: str | None) -> dict[str, Dataset]:
    """Load all splits by name. A single table is the split ``train``, as in ``datasets``."""
    if recipe.path.startswith("embedded:"):
        return _read_embedded(recipe.path.removeprefix("embedded:"), recipe)
    if is_in_memory(recipe.path):
        raise DataError(
            f"data.path: {recipe.path}: the examples came from a Python program and are not "
            "stored; pass them again: federate(recipe, data=...), resume(run, data=...)"
        )
    path = Path(recipe.path).expanduser()
    if is_pattern(path):
        return read_clients(path, recipe, media)
    if path.is_file() and not is_table(path):
        raise DataError(
            f"data.path: {path} has an unsupported format; convert it to one of "
            f"{join_values(TABLES)}, or name a folder or a hub id"
        )
    if "://" in recipe.path:
        raise DataError(
            f"data.path: {recipe.path} is a URL; download the file, or write the id of a data set "
            "on the hub, such as owner/name"
        )
    if not path.exists() and _looks_local(recipe.path):
        raise DataError(
            f"data.path: {path.absolute()} does not exist; write data.path=FILE "
            f"({join_values(TABLES)}), data.path=FOLDER, a hub id such as data.path=owner/name, "
            f"or data.path=embedded:{next(iter(EMBEDDED))}"
        )
    loaded = read_local(path, recipe, media) if path.exists() else read_hub(recipe, media)
    return {name: dataset.with_format(None) for name, dataset in loaded.items()}


def _read_embedded(name: str, recipe: DataRecipe) -> dict[str, Dataset]:
    if name not in EMBEDDED:
        raise DataError(
            f"data.path: there is no embedded:{name}{did_you_mean(name, EMBEDDED)}; "
            f"the embedded data sets are {join_values(EMBEDDED)}"
        )
    file = resources.files("fedmerge_peft.data") / "embedded" / EMBEDDED[name]
    with resources.as_file(file) as path:
        return read_local(path, recipe, None)


def _looks_local(path: str) -> bool:
    separators = path.count("/") if os.sep == "/" else path.count("/") + path.count(os.sep)
    return (
        path.startswith((".", "~", "/", os.sep))
        or separators > 1
        or Path(path).suffix.lower() in {*TABLES, *_OTHER_FILES}
    )


def _split_by_column(column: str, splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    if len(splits) > 1:
        raise DataError(
            f"data.split_column: the data already have splits ({join_values(splits)}); "
            "remove data.split_column"
        )
    (table,) = splits.values()
    numbers, names = encode_classes({"train": table}, column, "data.split_column")
    seen: dict[str, str] = {}
    for name in names:
        if (first := seen.setdefault(name.strip().casefold(), name)) != name:
            raise DataError(
                f"data.split_column: the column {column} has both {first!r} and {name!r}, which "
                "would be two splits; write the name of a split in the same way in all rows"
            )
    return {
        name: table.select(np.flatnonzero(numbers["train"] == number))
        for number, name in enumerate(names)
    }


def _select_splits(recipe: DataRecipe, splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Return the split for each role (train, validation, test) that the data provide."""
    requested = {
        "train": recipe.train_split,
        "validation": recipe.validation_split,
        "test": recipe.test_split,
    }
    column = recipe.split_column
    source = _source(recipe) if column is None else f"the column {column}"
    for role, name in requested.items():
        if name is not None and name not in splits:
            raise DataError(
                f"data.{role}_split: {source} has no split {name!r}{did_you_mean(name, splits)}; "
                f"it has {join_values(splits)}"
            )
        if name == recipe.train_split and role != "train":
            raise DataError(
                f"data.{role}_split: {name} is the training split; name another split, or remove "
                f"data.{role}_split to use its default"
            )
    for role in ("validation", "test"):
        if requested[role] is None and role in splits and role not in requested.values():
            requested[role] = role
    used = {role: splits[name] for role, name in requested.items() if name is not None}
    others = [
        f"{name} ({len(splits[name]):,})" for name in splits if name not in requested.values()
    ]
    if others:
        logger.warning(
            "%s: splits that are not used, with their numbers of rows: %s; to use one, name it in "
            "data.train_split, data.validation_split or data.test_split",
            source,
            join_values(others),
        )
    return used


def _filter(recipe: DataRecipe, splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    kept: dict[str, list[Any]] = {split: [] for split in splits}
    for column, setting in recipe.filter.items():
        key = f"data.filter.{column}"
        values = setting if isinstance(setting, list) else [setting]
        occurring = set()
        for split, dataset in splits.items():
            rows, matched = matching_rows(dataset, column, values, key)
            kept[split].append(rows)
            occurring |= matched
        absent = [value for value in values if value not in occurring]
        if absent or not values:
            present = value_names(splits["train"], column, key)
            fault = (
                f"no row has {absent[0]!r}{did_you_mean(absent[0], present)}"
                if absent
                else "the list is empty, so the filter removes all rows"
            )
            there = join_values(present) or "no values"
            raise DataError(f"{key}: {fault}; the column {column} has {there}")
    filtered = {
        split: splits[split].select(reduce(np.intersect1d, rows)) for split, rows in kept.items()
    }
    requested = {
        "train": recipe.train_split,
        "validation": recipe.validation_split,
        "test": recipe.test_split,
    }
    for split, dataset in filtered.items():
        if requested[split] is not None and not len(dataset):
            contents = "; ".join(
                f"{column}: "
                f"{join_values(value_names(splits[split], column, 'data.filter')) or 'no values'}"
                for column in recipe.filter
            )
            raise DataError(
                f"data.filter: no row of the split {requested[split]} passes the filter; choose "
                f"other values. In this split, the columns have {contents}"
            )
    return {split: dataset for split, dataset in filtered.items() if len(dataset)}


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """Disable the progress bars of ``datasets`` inside the context."""
    import datasets

    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
