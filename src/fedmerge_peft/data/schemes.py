"""Partition schemes: functions with the names of the schemes in recipes.

A scheme takes its recipe section and the ``Splits``. For the training split, and for other splits
if the scheme divides them by its own rule, it returns the ``ClientRows`` of each client, in the
same order for all splits. ``partition_alike`` partitions the splits that a scheme does not return.
The module ``partition`` draws the partitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, cast

import numpy as np

from fedmerge_peft.data import partition
from fedmerge_peft.data.clients import Indices
from fedmerge_peft.data.columns import encode_classes, join_values
from fedmerge_peft.data.partition import ClientRows, Stream, generator
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.data import (
        ClustersRecipe,
        DirichletRecipe,
        IidRecipe,
        NaturalRecipe,
        ShardsRecipe,
    )

Assigned = Mapping[str, list[ClientRows]]
"""The rows of each client, by split."""


class Splits:
    """Splits to partition: ``train`` and, if present, ``validation`` and ``test``.

    Args:
        tables: The rows of each split.
        label: The task's label column; None if examples have no label.
        seed: The recipe's seed.
        by: Column with the classes, from the scheme's section; None for the label column.
        lists: True if a list in the class column counts as its first value.
    """

    def __init__(
        self,
        tables: Mapping[str, Dataset],
        label: str | None = None,
        seed: int = 0,
        by: str | None = None,
        lists: bool = False,
    ) -> None:
        self.tables = tables
        self.label = label
        self.seed = seed
        self._by = by
        self._lists = lists

    def rng(self, split: str) -> np.random.Generator:
        """Return a new random generator for a split; each of them draws the same numbers."""
        return generator(self.seed, cast(Stream, split))

    @property
    def has_classes(self) -> bool:
        """True if there is a column with classes."""
        return self._by is not None or self.label is not None

    @cached_property
    def classes(self) -> Mapping[str, Indices]:
        """Class number of each row of each split, from 0; -1 for classes without training rows.

        Classes are the values of the column ``by``, or of the label column. Raises ``DataError`` if
        there is neither, or if the values cannot be numbered (``encode_classes``).
        """
        return self._numbered[0]

    @cached_property
    def class_names(self) -> Sequence[str]:
        """Names of the classes, in the order of their numbers. Raises the errors of ``classes``."""
        return self._numbered[1]

    @cached_property
    def _numbered(self) -> tuple[Mapping[str, Indices], Sequence[str]]:
        by = self._by if self._by is not None else self.label
        if by is None:
            raise DataError(
                "data.partition.by: the task has no label column to partition by; write "
                "data.partition.by=COLUMN (the data have "
                f"{join_values(self.tables['train'].column_names)}) or data.partition.scheme=iid"
            )
        key = "task.label" if self._by is None else "data.partition.by"
        return encode_classes(self.tables, by, key, lists=self._lists)


def partition_alike(splits: Splits, clients: Sequence[ClientRows]) -> Assigned:
    """Partition validation and test splits in the proportions of the training split.

    A client gets the same fraction of each class as in training. Without classes, it gets the same
    fraction of all rows.
    """
    numbers: Mapping[str, Indices]
    if splits.has_classes:
        numbers, count = splits.classes, len(splits.class_names)
    else:
        numbers = {s: np.zeros(len(t), np.int64) for s, t in splits.tables.items()}
        count = 1
    held = [client.rows for client in clients]
    shares = partition.class_counts(held, numbers["train"], count)
    dealt = {"train": list(clients)}
    for split, classes in numbers.items():
        if split != "train":
            rows = partition.assign_by_class(classes, shares, splits.rng(split))
            pairs = zip(clients, rows, strict=True)
            dealt[split] = [client._replace(rows=mine) for client, mine in pairs]
    return dealt


def assignment_fault(assigned: object, tables: Mapping[str, Dataset]) -> str | None:
    """Return the fault in a scheme's result, as words after "returned"; None if it is valid."""
    if not isinstance(assigned, Mapping) or "train" not in assigned:
        return "no dictionary with the key 'train'"
    for split, clients in assigned.items():
        if split not in tables:
            return f"the split {split!r}, but the data have {join_values(tables)}"
        if not clients or not all(isinstance(client, ClientRows) for client in clients):
            return f"no list of ClientRows for {split}"
        if len(clients) != len(assigned["train"]):
            counts = len(clients), len(assigned["train"])
            return f"different numbers of clients for {split} ({counts[0]}) and train ({counts[1]})"
        names = [client.name for client in clients]
        if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
            return f"client names for {split} that are not text, or not unique"
        if names != [client.name for client in assigned["train"]]:
            return f"other clients for {split} than for train, or in another order"
        for name, rows, _ in clients:
            if not isinstance(rows, np.ndarray) or rows.ndim != 1 or rows.dtype.kind not in "iu":
                return f"rows of {name} for {split} that are not a 1-d array of integers"
        rows = np.concatenate([client.rows for client in clients])
        if rows.size and not (rows.min() >= 0 and rows.max() < len(tables[split])):
            last = len(tables[split]) - 1
            bounds = f"outside 0 to {last}" if last >= 0 else "although this split has no rows"
            return f"row numbers for {split} {bounds}"
        if split == "train" and len(np.unique(rows)) < len(rows):
            return "a row of train twice"
    return None


def iid(recipe: IidRecipe, splits: Splits) -> Assigned:
    """Divide each split at random into parts whose sizes differ by at most 1."""
    return {
        split: partition.iid(len(table), recipe.clients, splits.rng(split))
        for split, table in splits.tables.items()
    }


def dirichlet(recipe: DirichletRecipe, splits: Splits) -> Assigned:
    """Distribute each class over the clients in proportions from a Dirichlet distribution."""
    return {
        "train": partition.dirichlet(
            splits.classes["train"],
            recipe.clients,
            recipe.alpha,
            recipe.min_examples,
            splits.rng("train"),
        )
    }


def clusters(recipe: ClustersRecipe, splits: Splits) -> Assigned:
    """Assign a random subset of the classes to each group of clients."""
    return {
        "train": partition.clusters(
            splits.classes["train"],
            recipe.clients,
            recipe.groups,
            recipe.classes_per_group,
            splits.rng("train"),
            size_spread=recipe.size_spread,
            deck=recipe.deck,
        )
    }


def shards(recipe: ShardsRecipe, splits: Splits) -> Assigned:
    """Sort the rows by class, cut them into shards, and assign the shards to clients."""
    return {
        "train": partition.shards(
            splits.classes["train"], recipe.clients, recipe.shards_per_client, splits.rng("train")
        )
    }


def natural(recipe: NaturalRecipe, splits: Splits) -> Assigned:
    """Create one or more clients for each value of a column."""
    numbers, names = splits.classes, splits.class_names
    groups = None
    if recipe.group is not None:
        groups = _groups(recipe.by, recipe.group, splits, numbers["train"], names)
    return {
        split: partition.natural(
            classes, names, recipe.clients_per_value, splits.rng(split), groups
        )
        for split, classes in numbers.items()
    }


def _groups(
    by: str, group: str, splits: Splits, classes: Indices, names: Sequence[str]
) -> list[str]:
    """Return the group of each value of the column ``by``, read from the training rows."""
    train = {"train": splits.tables["train"]}
    numbers, group_names = encode_classes(train, group, "data.partition.group")
    pairs = np.unique(np.stack([classes, numbers["train"]], axis=1), axis=0)  # (pairs, 2)
    values, counts = np.unique(pairs[:, 0], return_counts=True)
    if counts.max() > 1:
        value = values[counts.argmax()]
        several = join_values(group_names[number] for number in pairs[pairs[:, 0] == value, 1])
        raise DataError(
            f"data.partition.group: the rows of {by} {names[value]} have several values of "
            f"{group} ({several}), but a client belongs to one group; name a column with the same "
            "value in all rows of a client, or remove data.partition.group"
        )
    return [group_names[number] for number in pairs[:, 1]]
