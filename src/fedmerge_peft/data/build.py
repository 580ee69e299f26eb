"""From a data recipe to clients: the splits are read, dealt, and joined into one table that holds only rows in use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import numpy as np

from fedmerge_peft.data import partition
from fedmerge_peft.data.clients import Client, FederatedData, Indices
from fedmerge_peft.data.columns import encode_classes, join_values
from fedmerge_peft.data.loading import load_splits
from fedmerge_peft.data.partition import ClientRows, Stream, generator
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import (
    ClustersRecipe,
    DataRecipe,
    DirichletRecipe,
    IidRecipe,
    NaturalRecipe,
    ShardsRecipe,
)

if TYPE_CHECKING:
    from datasets import Dataset


def federate_data(recipe: DataRecipe, label: str | None, seed: int) -> FederatedData:
    """Read the data that a recipe names and deal them to its clients.

    Validation and test splits follow the training rows: a client gets of each class the part it has of it in training; with
    the natural scheme, the rows with its value; with iid, equal parts. Where such a split is absent, a part of each client's own
    training rows is set aside (``partition.split_off``).

    Args:
        recipe: Source and partition.
        label: The task's label column; None where examples have no label.
        seed: The recipe's seed. The same seed gives the same clients, whatever training draws from it.

    Returns:
        One table, training rows first, in which every row is held by some client; and the clients, groups together. A
        client's validation or test rows may be none, where the split has nothing for it.

    Raises:
        DataError: The data cannot be loaded; a column is absent or has nulls; the splits' columns differ; there are fewer
            examples than clients; a client is left without training rows; the set-aside fractions leave nothing to train on.
    """
    splits = load_splits(recipe)
    _check_columns(splits)
    if label is not None:
        encode_classes(splits, label, "task.label")
    held = _partition(recipe, splits, label, seed)
    validation = 0.0 if "validation" in held else recipe.validation_fraction
    test = 0.0 if "test" in held else recipe.test_fraction
    if validation + test >= 1:
        raise DataError(
            f"data: validation_fraction {validation:g} and test_fraction {test:g} leave nothing to train on; lower one, or name a split"
        )
    clients = []
    for number, (name, rows, group) in enumerate(held["train"]):
        kept, validated, tested = partition.split_off(
            rows, validation, test, recipe.max_train, generator(seed, "set aside", number)
        )
        validated = held["validation"][number].rows if "validation" in held else validated
        tested = held["test"][number].rows if "test" in held else tested
        if recipe.max_test is not None and len(tested) > recipe.max_test:
            tested = np.sort(
                generator(seed, "max_test", number).choice(tested, recipe.max_test, replace=False)
            )
        clients.append(Client(name, kept, validated, tested, group))
    _check_no_empty_client(clients)
    return _drop_unused_rows(FederatedData(_join(splits), clients))


def _partition(
    recipe: DataRecipe, splits: Mapping[str, Dataset], label: str | None, seed: int
) -> dict[str, list[ClientRows]]:
    """Each client's rows of each split, as row numbers of the joined splits."""
    scheme = recipe.partition
    examples = len(splits["train"])
    if not isinstance(scheme, NaturalRecipe) and scheme.clients > examples:
        raise DataError(
            f"data.partition.clients: {scheme.clients:,} clients, and {examples:,} training examples; "
            "lower data.partition.clients, or let data.filter keep more"
        )
    dealt = (
        _partition_iid(scheme, splits, seed)
        if isinstance(scheme, IidRecipe)
        else _partition_by_column(scheme, splits, label, seed)
    )
    held: dict[str, list[ClientRows]] = {}
    start = 0
    for split, dataset in splits.items():
        held[split] = [holding._replace(rows=holding.rows + start) for holding in dealt[split]]
        start += len(dataset)
    return held


def _partition_iid(
    scheme: IidRecipe, splits: Mapping[str, Dataset], seed: int
) -> dict[str, list[ClientRows]]:
    return {
        split: partition.iid(len(dataset), scheme.clients, generator(seed, _stream(split)))
        for split, dataset in splits.items()
    }


def _partition_by_column(
    scheme: DirichletRecipe | ClustersRecipe | NaturalRecipe | ShardsRecipe,
    splits: Mapping[str, Dataset],
    label: str | None,
    seed: int,
) -> dict[str, list[ClientRows]]:
    by = scheme.by if scheme.by is not None else label
    if by is None:
        raise DataError(
            f"data.partition.by: the task has no label column to deal by; write data.partition.by=COLUMN "
            f"(the data have {join_values(splits['train'].column_names)}) or data.partition.scheme=iid"
        )
    key = "task.label" if scheme.by is None else "data.partition.by"
    numbers, names = encode_classes(splits, by, key)
    train, rng = numbers["train"], generator(seed, "train")
    if isinstance(scheme, NaturalRecipe):
        groups = None if scheme.group is None else _groups(scheme, splits, train, names)
        return {
            split: partition.natural(
                classes, names, scheme.clients_per_value, generator(seed, _stream(split)), groups
            )
            for split, classes in numbers.items()
        }
    if isinstance(scheme, DirichletRecipe):
        holdings = partition.dirichlet(
            train, scheme.clients, scheme.alpha, scheme.min_examples, rng
        )
    elif isinstance(scheme, ClustersRecipe):
        holdings = partition.clusters(
            train, scheme.clients, scheme.groups, scheme.classes_per_group, rng
        )
    else:
        holdings = partition.shards(train, scheme.clients, scheme.shards_per_client, rng)
    shares = partition.class_counts([holding.rows for holding in holdings], train, len(names))
    dealt = {"train": holdings}
    for split, classes in numbers.items():
        if split != "train":
            rows = partition.assign_by_class(classes, shares, generator(seed, _stream(split)))
            dealt[split] = [
                holding._replace(rows=mine) for holding, mine in zip(holdings, rows, strict=True)
            ]
    return dealt


def _stream(split: str) -> Stream:
    return cast(Stream, split)


def _groups(
    scheme: NaturalRecipe, splits: Mapping[str, Dataset], classes: Indices, names: Sequence[str]
) -> list[str]:
    """The group of each value, from training rows."""
    assert scheme.group is not None  # noqa: S101
    numbers, group_names = encode_classes(
        {"train": splits["train"]}, scheme.group, "data.partition.group"
    )
    pairs = np.unique(
        np.stack([classes, numbers["train"]], axis=1), axis=0
    )  # (pairs, 2): value, group
    values, counts = np.unique(pairs[:, 0], return_counts=True)
    if counts.max() > 1:
        value = values[counts.argmax()]
        several = join_values(group_names[group] for group in pairs[pairs[:, 0] == value, 1])
        raise DataError(
            f"data.partition.group: {scheme.by} {names[value]} has rows of several {scheme.group} ({several}), and a client is in one "
            "group; name a column that is the same for all its rows, or leave data.partition.group out"
        )
    return [group_names[group] for group in pairs[:, 1]]


def _check_columns(splits: Mapping[str, Dataset]) -> None:
    train = splits["train"].features
    for split, dataset in splits.items():
        names = [*train, *(name for name in dataset.features if name not in train)]
        differ = [name for name in names if train.get(name) != dataset.features.get(name)]
        if differ:
            texts = (
                f"{name} is {_type(train.get(name))} in train, {_type(dataset.features.get(name))} in {split}"
                for name in differ
            )
            raise DataError(
                f"data: the splits have different columns: {join_values(texts, 5)}; give them the same columns and types"
            )


def _type(feature: object) -> str:
    if feature is None:
        return "absent"
    return (
        f"ClassLabel({join_values(feature.names, 5)})"
        if hasattr(feature, "names")
        else str(getattr(feature, "dtype", feature))
    )


def _check_no_empty_client(clients: Sequence[Client]) -> None:
    empty = [client.name for client in clients if not client.size]
    if empty:
        raise DataError(
            f"data.partition: {len(empty)} of {len(clients)} clients have no training examples ({join_values(empty, 5)}); lower the number "
            "of clients (clients, clients_per_value), or let data.filter keep more examples"
        )


def _join(splits: Mapping[str, Dataset]) -> Dataset:
    from datasets import concatenate_datasets

    return concatenate_datasets(list(splits.values())) if len(splits) > 1 else splits["train"]


def _drop_unused_rows(data: FederatedData) -> FederatedData:
    """The same clients on a table without the rows that nobody holds."""
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
