"""Create clients from a data recipe: load, partition and join the splits."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from fedmerge_peft.data import partition
from fedmerge_peft.data.clients import Client, FederatedData, Indices
from fedmerge_peft.data.columns import (
    class_label,
    encode_classes,
    join_values,
    warn_of_lookalikes,
)
from fedmerge_peft.data.loading import load_splits
from fedmerge_peft.data.partition import ClientRows, generator
from fedmerge_peft.data.schemes import Splits, assignment_fault, partition_alike
from fedmerge_peft.errors import DataError
from fedmerge_peft.plugins import PARTITIONS
from fedmerge_peft.recipe.data import DataRecipe

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)


def federate_data(
    recipe: DataRecipe,
    label: str | None,
    seed: int,
    media: str | None = None,
    *,
    whole: bool = True,
    splits: Mapping[str, Dataset] | None = None,
) -> FederatedData:
    """Load the data of a recipe and partition them among clients.

    Validation and test splits are partitioned like the training split: a client gets the same
    fraction of each class as in training. Some schemes divide these splits by their own rule. With
    natural, the rows with a value of the column ``by`` go to the clients of this value. With iid,
    all clients get about equally many rows. If a split is missing, a fraction of each client's
    training rows replaces the split (``partition.split_off``).

    Args:
        recipe: Source and partition.
        label: Label column of the task, or None if examples have no label.
        seed: Seed of the recipe. It determines all random draws of the partition; random numbers
            that are drawn in training do not change the clients.
        media: Column with images or audio of the task, or None. A relative path in this column is
            resolved against the folder of the table if it leads to a file there.
        whole: True if the data are those of all clients. They must then have several labels, and
            each split must share a label with the training split. False for the data of a single
            site.
        splits: Examples in memory, instead of those at ``recipe.path`` (``take_data``).

    Returns:
        Table with the rows of the training split first, and the clients in the order of the
        partition scheme. Every row belongs to a client. A client may have no validation or test
        rows.

    Raises:
        DataError: The data cannot be loaded; the label column or a column of the scheme does not
            exist or has nulls; the columns of the splits differ; with ``whole``, all training
            examples have the same label, or no label of a split occurs in training; there are fewer
            training examples than clients; a client has no training rows; the validation and test
            fractions leave no training rows; the scheme cannot divide the rows, or returns an
            invalid assignment.
        PluginError: A scheme from a plugin fails.
    """
    splits = load_splits(recipe, media, splits)
    _check_columns(splits)
    if label is not None:
        numbers, names = encode_classes(splits, label, "task.label")
        warn_of_lookalikes(names, "task.label", "labels")
        if whole:
            _reject_one_label(names, label, recipe)
        _check_unseen_labels(numbers, label, reject=whole)
    partitioned = _partition(recipe, splits, label, seed)
    validation = 0.0 if "validation" in partitioned else recipe.validation_fraction
    test = 0.0 if "test" in partitioned else recipe.test_fraction
    if validation + test >= 1:
        raise DataError(
            f"data: validation_fraction {validation:g} and test_fraction {test:g} leave nothing to "
            "train on; lower one of them, or name a split in data.validation_split or "
            "data.test_split"
        )
    clients = []
    for number, (name, rows, group) in enumerate(partitioned["train"]):
        train_rows, validation_rows, test_rows = partition.split_off(
            rows, validation, test, recipe.max_train, generator(seed, "set aside", number)
        )
        if "validation" in partitioned:
            validation_rows = partitioned["validation"][number].rows
        if "test" in partitioned:
            test_rows = partitioned["test"][number].rows
        if recipe.max_test is not None and len(test_rows) > recipe.max_test:
            rng = generator(seed, "max_test", number)
            test_rows = np.sort(rng.choice(test_rows, recipe.max_test, replace=False))
        clients.append(Client(name, train_rows, validation_rows, test_rows, group))
    _check_no_empty_client(clients, recipe)
    warn_of_lookalikes((client.name for client in clients), "data.partition", "clients")
    if not any(len(client.validation) + len(client.test) for client in clients):
        logger.warning(
            "no client has validation or test examples, so no model is scored; raise "
            "data.validation_fraction or data.test_fraction (a client needs three examples or "
            "more), or name a split in data.test_split"
        )
    return _drop_unused_rows(FederatedData(_join(splits), clients))


def _partition(
    recipe: DataRecipe, splits: Mapping[str, Dataset], label: str | None, seed: int
) -> dict[str, list[ClientRows]]:
    """Assign the rows of each split to clients, as row numbers of the joined splits."""
    scheme = recipe.partition
    examples, clients = len(splits["train"]), getattr(scheme, "clients", 0)
    if clients > examples:
        raise DataError(
            f"data.partition.clients: {clients:,} clients, but {examples:,} training "
            f"example{'s' * (examples != 1)}; lower data.partition.clients{_or_relax(recipe)}"
        )
    by = getattr(scheme, "by", None)
    tables = Splits(splits, label, seed, by, scheme.counts_lists)
    entry = PARTITIONS[scheme.scheme]
    with entry.named_in_errors("partition scheme"):
        per_split = entry.load()(scheme, tables)
    if fault := assignment_fault(per_split, splits):
        raise DataError(
            f"data.partition: the scheme {entry.name!r} of {entry.module} returned {fault}; "
            "correct the plugin"
        )
    if per_split.keys() != splits.keys():
        per_split = {**partition_alike(tables, per_split["train"]), **per_split}
    if (column := label if by is None else by) is not None:
        _count_without_client(tables.classes, per_split, column)
    shifted: dict[str, list[ClientRows]] = {}
    start = 0
    for split, dataset in splits.items():
        shifted[split] = [client._replace(rows=client.rows + start) for client in per_split[split]]
        start += len(dataset)
    return shifted


def _count_without_client(
    classes: Mapping[str, Indices], per_split: Mapping[str, Sequence[ClientRows]], column: str
) -> None:
    for split, numbers in classes.items():
        held = np.concatenate([client.rows for client in per_split[split]])
        if unseen := len(np.setdiff1d(np.flatnonzero(numbers < 0), held)):
            logger.warning(
                "%d of %d %s examples %s to no client, because no training example has the same "
                "value in the column %s",
                unseen,
                len(numbers),
                split,
                "belongs" if unseen == 1 else "belong",
                column,
            )


def _or_relax(recipe: DataRecipe) -> str:
    return ", or relax data.filter" if recipe.filter else ""


def _reject_one_label(names: Sequence[str], label: str, recipe: DataRecipe) -> None:
    if len(names) == 1:
        raise DataError(
            f"task.label: all training examples have the same value in the column {label}, "
            f"{names[0]!r}, so there is nothing to learn; name the column with the labels in "
            f"task.label{_or_relax(recipe)}"
        )


def _check_unseen_labels(numbers: Mapping[str, Indices], label: str, *, reject: bool) -> None:
    """Log a warning for labels that no training example has.

    With ``reject``, raise ``DataError`` if a split has only such labels. ``reject`` is False for a
    single site, because its splits may be so small that they have no label in common.
    """
    for split, labels in numbers.items():
        unseen = int((labels < 0).sum())
        if reject and unseen and unseen == len(labels):
            raise DataError(
                f"task.label: no value of the column {label} in the {split} split occurs in the "
                "training examples; write labels in the same way in all splits, or name another "
                f"split in data.{split}_split"
            )
        if unseen:
            logger.warning(
                "%d of %d %s examples %s a label that no training example has (column %s)",
                unseen,
                len(labels),
                split,
                "has" if unseen == 1 else "have",
                label,
            )


def _check_columns(splits: Mapping[str, Dataset]) -> None:
    train = splits["train"].features
    for split, dataset in splits.items():
        names = [*train, *(name for name in dataset.features if name not in train)]
        differ = [name for name in names if train.get(name) != dataset.features.get(name)]
        if differ:
            texts = (
                f"{name} is {_type(train.get(name), dataset.features.get(name))} in train, "
                f"{_type(dataset.features.get(name), train.get(name))} in {split}"
                for name in differ
            )
            raise DataError(
                f"data: the splits have different columns: {join_values(texts, 5)}; "
                "give them the same columns and types"
            )


def _type(feature: object, other: object) -> str:
    if feature is None:
        return "absent"
    if hasattr(feature, "names"):
        return class_label(feature.names, getattr(other, "names", None))
    return str(getattr(feature, "dtype", feature))


def _check_no_empty_client(clients: Sequence[Client], recipe: DataRecipe) -> None:
    empty = [client.name for client in clients if not client.size]
    if empty:
        numbers = ("clients", "clients_per_value")
        key = next((name for name in numbers if hasattr(recipe.partition, name)), None)
        remedy = "change data.partition" if key is None else f"lower data.partition.{key}"
        raise DataError(
            f"data.partition: {len(empty)} of {len(clients)} clients "
            f"{'has' if len(empty) == 1 else 'have'} no training examples "
            f"({join_values(empty, 5)}); {remedy}{_or_relax(recipe)}"
        )


def _join(splits: Mapping[str, Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets(list(splits.values())) if len(splits) > 1 else splits["train"]


def _drop_unused_rows(data: FederatedData) -> FederatedData:
    """Remove rows without a client from the table, and renumber the clients' rows."""
    used = np.unique(
        np.concatenate(
            [
                rows
                for client in data.clients
                for rows in (client.train, client.validation, client.test)
            ]
        )
    )

    def renumber(rows: Indices) -> Indices:
        return np.searchsorted(used, rows).astype(np.int64)

    clients = [
        replace(
            client,
            train=renumber(client.train),
            validation=renumber(client.validation),
            test=renumber(client.test),
        )
        for client in data.clients
    ]
    return FederatedData(data.table.select(used), clients)
