"""A newcomer's examples, read as the run's task requires, and its label prior."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from fedmerge_peft.adapters.layout import AdapterLayout
from fedmerge_peft.data import Client, Indices, load_splits
from fedmerge_peft.data.in_memory import read_parts
from fedmerge_peft.data.partition import split_off
from fedmerge_peft.errors import DataError, RunError
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.data import DataRecipe
from fedmerge_peft.runs.directory import RunDirectory
from fedmerge_peft.strategies.label_counts import LabelPriors
from fedmerge_peft.strategies.label_prior import bias_columns
from fedmerge_peft.tasks.labels import relabel
from fedmerge_peft.util.seeds import derive
from fedmerge_peft.util.text import printable

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.data.in_memory import Parts


def read_newcomer(
    run: RunDirectory,
    data: Path | str | Parts,
    name: str | None,
    test_fraction: float,
    max_train: int | None,
    seed: int,
) -> tuple[Dataset, Client]:
    """Return the newcomer's table, and the ``Client`` with the table's training and test rows.

    If each example has one label, the labels in the table have the ids of the run. Arguments and
    errors are those of ``personalize``.
    """
    from datasets import concatenate_datasets

    if not 0 <= test_fraction < 1:
        raise DataError(
            f"test_fraction: found {test_fraction:g}, expected a number of at least 0 and below 1, "
            "so that training examples remain"
        )
    if isinstance(data, str | Path):
        splits, name = _load(run.recipe, Path(data).expanduser()), name or Path(data).stem
    else:
        splits, name = read_parts(data, _usual_splits(run.recipe)), name or "newcomer"
        if not any(map(len, splits.values())):
            raise DataError("data: there are no rows; pass a table with examples")
    table = concatenate_datasets(list(splits.values()))
    if (label := run.recipe.task.label_column) is not None:
        table = relabel(table, label, run.task["labels"])
    indices = _indices_by_split(run.recipe, splits, table)
    rng = np.random.default_rng(derive(seed, "newcomer", name))
    train, _, test = split_off(
        indices["train"], 0, 0 if "test" in indices else test_fraction, max_train, rng
    )
    if not len(train):
        raise DataError(
            f"{name}: there are no training examples; add rows, in the training split if the data "
            "have splits"
        )
    return table, Client(name, train, np.empty(0, np.int64), indices.get("test", test))


def _load(recipe: Recipe, path: Path) -> dict[str, Dataset]:
    """Load a file or folder without the recipe's filter.

    Return ``train`` and, if the data have these splits, ``validation`` and ``test``.
    """
    try:
        there = path != Path() and path.exists()
    except (OSError, ValueError):  # not a valid file name
        there = False
    if not there:
        fault = (
            "data: the path is empty or is the current folder"
            if path == Path()
            else f"{printable(str(path.absolute()))[:300]} does not exist"
        )
        raise DataError(
            f"{fault}; give the new client's examples as a csv, tsv, json, jsonl, parquet or "
            "arrow file"
        )
    source: dict[str, Any] = {"path": str(path), "config": None, "revision": None, "filter": {}}
    data = _usual_splits(recipe).model_copy(update=source)
    return load_splits(data, recipe.task.media_column)


def _usual_splits(recipe: Recipe) -> DataRecipe:
    """Return the recipe's data section with ``train`` as the only named split.

    The section has no split column.
    """
    names = {
        "train_split": "train",
        "validation_split": None,
        "test_split": None,
        "split_column": None,
    }
    return recipe.data.model_copy(update=names)


def _indices_by_split(
    recipe: Recipe, splits: Mapping[str, Dataset], table: Dataset
) -> dict[str, Indices]:
    """Return the row numbers of the table that are for training (``train``) and testing (``test``).

    Rows of a validation split are for training. If the data have neither several splits nor the
    recipe's split column, all rows are for training, and the result has no key ``test``.
    """
    column = recipe.data.split_column
    if len(splits) > 1:
        names = np.concatenate([np.full(len(part), split) for split, part in splits.items()])
        sources = {"train": ("train", "validation"), "test": ("test",)}
    elif column is not None and column in table.column_names:
        names = np.array([str(value) for value in table[column]])
        data = recipe.data
        sources = {
            "train": (data.train_split, data.validation_split or "validation"),
            "test": (data.test_split or "test",),
        }
    else:
        return {"train": np.arange(len(table))}
    return {part: np.flatnonzero(np.isin(names, split)) for part, split in sources.items()}


def newcomer_prior(
    run: RunDirectory, layout: AdapterLayout, counts: list[list[int]] | None
) -> Tensor:
    """Return the newcomer's label prior, to add to an adapter, ``(P,)``.

    The prior is zero if the run has no ``serving.label_prior``, or if there are no counts.

    Args:
        run: The run. The label counts of its clients serve to estimate the prior.
        layout: Layout of the adapters.
        counts: The newcomer's training examples by label, ``1 × classes``; None if the task counts
            no labels.

    Raises:
        RunError: The clients' label counts are missing.
    """
    prior = torch.zeros(layout.size)
    if run.recipe.serving.label_prior and counts is not None:
        known = run.label_counts
        if known is None:
            raise RunError(
                f"{run.path}: labels.json is missing, so the newcomer's label prior is unknown; "
                "run the recipe again to write it"
            )
        priors = LabelPriors.fit(torch.tensor(known.to_numpy()))
        balanced = run.recipe.training.logits == "adjusted"
        shifts = priors.shifts(torch.tensor(counts), balanced=balanced)
        prior[bias_columns(layout, shifts.shape[1])] = shifts[0]
    return prior
