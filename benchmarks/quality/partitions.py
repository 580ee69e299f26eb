"""Partition scheme ``tasks``: clients of several tasks that differ in labels or in size."""

from __future__ import annotations

import numpy as np
from pydantic import PositiveFloat, PositiveInt

from fedmerge_peft import ClientRows, PartitionRecipe, Splits, register_partition
from fedmerge_peft.data import partition
from fedmerge_peft.data.columns import encode_classes


class TasksRecipe(PartitionRecipe):
    """Each value of a column is a task of several clients, which differ in labels or in size."""

    by: str
    """Column with the task."""
    label: str
    """Column with the label."""
    clients_per_value: PositiveInt
    """Number of clients of each task."""
    alpha: PositiveFloat | None = None
    """Concentration of the labels at the clients of a task. Default: equal label distributions."""
    least: PositiveInt = 1
    """Training examples of the smallest client, if ``most`` is set."""
    most: PositiveInt | None = None
    """Training examples of the largest client. The sizes in between are a geometric sequence.
    Default: each client keeps all of its examples."""


@register_partition("tasks", recipe=TasksRecipe)
def tasks(recipe: TasksRecipe, splits: Splits) -> dict[str, list[ClientRows]]:
    """Distribute the labels of each task over its clients, then reduce clients to their sizes."""
    rng = splits.rng("train")
    labels, label_names = encode_classes(splits.tables, recipe.label, "data.partition.label")
    number = len(label_names)
    joint = {name: splits.classes[name] * number + labels[name] for name in splits.tables}
    clients: list[ClientRows] = []
    for value, task in enumerate(splits.class_names):
        rows = np.flatnonzero(splits.classes["train"] == value)
        if recipe.alpha is None:
            parts = np.array_split(rng.permutation(rows), recipe.clients_per_value)
        else:
            dealt = partition.dirichlet(
                labels["train"][rows], recipe.clients_per_value, recipe.alpha, 120, rng
            )
            parts = [rows[part.rows] for part in dealt]
        clients += [
            ClientRows(f"{task}-{client:02}", np.sort(part), task)
            for client, part in enumerate(parts)
        ]
    count = number * len(splits.class_names)
    shares = partition.class_counts([client.rows for client in clients], joint["train"], count)
    assigned = {"train": clients}
    for name in splits.tables:
        if name != "train":
            dealt_rows = partition.assign_by_class(joint[name], shares, splits.rng(name))
            assigned[name] = [
                client._replace(rows=rows) for client, rows in zip(clients, dealt_rows, strict=True)
            ]
    if recipe.most is not None:
        sizes = rng.permutation(
            np.geomspace(recipe.least, recipe.most, len(clients)).round().astype(int)
        )
        assigned["train"] = [
            client._replace(rows=np.sort(rng.permutation(client.rows)[:size]))
            for client, size in zip(clients, sizes, strict=True)
        ]
    return assigned
