"""A site's own examples, and a recipe's examples dealt to sites for a rehearsal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedmerge_peft.data import Client, FederatedData, federate_data
from fedmerge_peft.data.columns import join_values
from fedmerge_peft.data.loading import no_progress_bars
from fedmerge_peft.errors import DataError, FederateError, RefusedError
from fedmerge_peft.recipe import Recipe, yaml_document
from fedmerge_peft.recipe.data import IidRecipe, NaturalRecipe
from fedmerge_peft.sites.config import SITE, SiteChecks, SiteData
from fedmerge_peft.tasks.classification import infer_labels, relabel
from fedmerge_peft.tasks.text_formats import infer_format
from fedmerge_peft.util.files import write_text

if TYPE_CHECKING:
    from datasets import Dataset

CLIENT, SPLIT, GROUP = "fedmerge_client", "fedmerge_split", "fedmerge_group"
"""Columns of a rehearsal's files."""


@dataclass(frozen=True)
class SiteSummary:
    """What a site tells of its data, before anything is trained: names and numbers, no example."""

    clients: tuple[dict[str, Any], ...]
    """``name``, ``group``, and how many examples: ``train``, ``validation``, ``test``."""
    labels: tuple[str, ...] | None
    """Names of the labels that occur; None where examples have none."""
    format: str | None
    """How texts are laid out, where the task has several ways."""
    columns: tuple[str, ...]


def read_data(
    data: SiteData, recipe: Recipe, clients: Sequence[str], folder: Path
) -> FederatedData:
    """Read a site's examples and find its clients.

    Args:
        data: Where they are.
        recipe: The federation's; its task names the columns, its ``data`` says how much is set aside.
        clients: The names of the site's clients, as the federation knows them.
        folder: What a relative path starts from.

    Raises:
        DataError: They cannot be read, or are not what the recipe says.
        FederateError: They are other clients' than the federation knows.
    """
    path = Path(data.path).expanduser()
    inside = folder / path
    usual = {
        "train_split": "train",
        "validation_split": None,
        "test_split": None,
        "config": None,
        "revision": None,
    }
    own = {
        "path": str(inside) if inside.exists() else data.path,
        "split_column": data.split_column,
        "filter": data.filter,
    }
    own |= {
        key: value
        for key in ("validation_fraction", "test_fraction")
        if (value := getattr(data, key)) is not None
    }
    by = data.client_column
    scheme = (
        IidRecipe(scheme="iid", clients=1)
        if by is None
        else NaturalRecipe(scheme="natural", by=by, group=data.group_column)
    )
    if by is None and len(clients) > 1:
        raise FederateError(
            f"{SITE}: the federation knows {len(clients)} clients of this site; say which column names them: data.client_column"
        )
    label = getattr(recipe.task, "label", None)
    found = federate_data(
        recipe.data.model_copy(update={**usual, **own, "partition": scheme}), label, recipe.seed
    )
    if by is None:
        (client,) = found.clients
        return FederatedData(found.table, [replace(client, name=clients[0], group="")])
    named = {client.name: client for client in found.clients}
    if named.keys() != set(clients):
        raise FederateError(
            f"{SITE}: data.client_column: the column {by} holds {join_values(named)}, and the federation knows {join_values(clients)} of this site"
        )
    return FederatedData(found.table, [named[name] for name in clients])


def check_data(data: FederatedData, checks: SiteChecks) -> None:
    """Raise ``RefusedError`` where the data are not what the site wants them to be before anything is computed from them."""
    for client in data.clients:
        if client.size < checks.min_examples:
            raise RefusedError(
                f"client {client.name} has {client.size} training examples, and checks.min_examples in {SITE} is {checks.min_examples}"
            )
        if (
            checks.max_repeated < 1
            and (repeated := _repeated(data.table, client)) > checks.max_repeated
        ):
            raise RefusedError(
                f"client {client.name}: {repeated:.0%} of its rows repeat another, and "
                f"checks.max_repeated in {SITE} is {checks.max_repeated:g}"
            )


def _repeated(table: Dataset, client: Client) -> float:
    """Which part of a client's rows are equal to one before them."""
    rows = np.concatenate([client.train, client.validation, client.test])
    distinct = {repr(row) for row in table.select(rows)}
    return 1 - len(distinct) / len(rows)


def tell(data: FederatedData, recipe: Recipe) -> SiteSummary:
    """What is told of the data. Raises ``DataError`` where they are not what the task says."""
    clients = tuple(
        {
            "name": each.name,
            "group": each.group,
            "train": each.size,
            "validation": len(each.validation),
            "test": len(each.test),
        }
        for each in data.clients
    )
    columns = tuple(data.table.column_names)
    if recipe.task.name == "causal-lm":
        return SiteSummary(clients, None, infer_format(recipe.task, data.table), columns)
    return SiteSummary(
        clients, tuple(infer_labels(data.table, recipe.task.label, None)), None, columns
    )


def agree_on_labels(told: Sequence[Sequence[str]], num_labels: int | None) -> list[str]:
    """The labels of a federation, in the order of their ids, from those that occur at each site.

    Where the longest list has all the others' names it stands as it is; else all names are sorted. ``num_labels`` fills up as in a run.
    """
    longest = max((list(labels) for labels in told), key=len)
    union = {label for labels in told for label in labels}
    labels = longest if union == set(longest) else sorted(union)
    if num_labels is None:
        return labels
    if len(labels) > num_labels:
        raise FederateError(
            f"task.num_labels: {num_labels}, and the sites have {len(labels)} labels: {join_values(labels)}"
        )
    return [*labels, *(f"LABEL_{label}" for label in range(len(labels), num_labels))]


def numbered(data: FederatedData, recipe: Recipe, labels: Sequence[str]) -> FederatedData:
    """The data with labels numbered as the federation's. Raises ``DataError`` for labels that it does not know."""
    if recipe.task.name == "causal-lm":
        return data
    return FederatedData(relabel(data.table, recipe.task.label, labels), data.clients)


def stand_in(recipe: Recipe, labels: Sequence[str], columns: Sequence[str]) -> Dataset:
    """A table without real examples, from which a task can tell labels and columns: the server has nothing else."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = [name for name in columns if not labels or name != getattr(recipe.task, "label", None)]
    if not labels:
        return Dataset.from_dict({name: [""] for name in names})
    label = getattr(recipe.task, "label", "label")
    features = Features(
        {**{name: Value("string") for name in names}, label: ClassLabel(names=list(labels))}
    )
    values: dict[str, list[Any]] = {name: [""] * len(labels) for name in names}
    return Dataset.from_dict({**values, label: list(range(len(labels)))}, features=features)


# ---- rehearsals ----------------------------------------------------------------------------------


def deal(data: FederatedData, sites: int) -> dict[str, list[str]]:
    """The clients of each of so many sites, as even as it goes, in the order of the clients. Raises ``DataError`` for too few."""
    names = [client.name for client in data.clients]
    if len(names) < sites:
        raise DataError(
            f"--sites {sites}: the recipe has {len(names)} clients, and each site needs one; ask for fewer sites"
        )
    return {
        f"site-{number}": list(part)
        for number, part in enumerate(np.array_split(np.array(names, dtype=object), sites), start=1)
    }


def write_site(
    data: FederatedData, clients: Sequence[str], kit: Path, more: Mapping[str, Any]
) -> None:
    """Write these clients' examples as ``data.parquet`` into a site's kit, and a ``site.yaml`` that reads them just as they were dealt."""
    held = [client for client in data.clients if client.name in clients]
    rows, columns = [], {CLIENT: [], SPLIT: [], GROUP: []}  # type: ignore[var-annotated]
    for client in held:
        for split, part in (
            ("train", client.train),
            ("validation", client.validation),
            ("test", client.test),
        ):
            rows.append(part)
            for column, value in ((CLIENT, client.name), (SPLIT, split), (GROUP, client.group)):
                columns[column] += [value] * len(part)
    table = data.table.select(np.concatenate(rows))
    with no_progress_bars():
        for column, values in columns.items():
            table = table.add_column(column, values)
    with no_progress_bars():
        table.to_parquet(kit / "data.parquet")
    said = {
        "data": {
            "path": "data.parquet",
            "client_column": CLIENT,
            "group_column": GROUP,
            "split_column": SPLIT,
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
        },
        **more,
    }
    write_text(kit / SITE, yaml_document.write(said))
