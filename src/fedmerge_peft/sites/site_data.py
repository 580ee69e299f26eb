"""A site's examples and their summary; a recipe's examples split over sites for a rehearsal."""

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
from fedmerge_peft.sites.config import SITE_FILE, SiteChecks, SiteData
from fedmerge_peft.tasks import task_type
from fedmerge_peft.util.files import write_text

if TYPE_CHECKING:
    from datasets import Dataset

CLIENT_COLUMN, SPLIT_COLUMN, GROUP_COLUMN = "fedmerge_client", "fedmerge_split", "fedmerge_group"
"""Columns that a rehearsal adds to the examples of its sites."""


@dataclass(frozen=True)
class SiteSummary:
    """Summary of a site's data, sent to the server before training; it contains no examples."""

    clients: tuple[dict[str, Any], ...]
    """``name`` and ``group`` of each client, and its number of examples: ``train``,
    ``validation``, ``test``."""
    labels: tuple[str, ...] | None
    """Names of the labels (``Task.labels_in``), of which some may not occur; None if the task has
    no labels."""
    format: str | None
    """Text format; None if the task has no formats."""
    columns: tuple[str, ...]
    """Names of the columns."""


def read_site_data(
    data: SiteData, recipe: Recipe, clients: Sequence[str], folder: Path
) -> FederatedData:
    """Read a site's examples and divide them among its clients.

    Args:
        data: The section ``data`` of ``site.yaml``.
        recipe: Recipe of the federation: ``task`` names the columns, ``data`` has the settings that
            ``site.yaml`` cannot set or leaves out.
        clients: Names of the site's clients in the federation.
        folder: Folder in which a relative path is looked up. If it does not exist there, the path
            is used as written; it may be a hub id.

    Raises:
        DataError: The examples cannot be read, or do not fit the recipe.
        FederateError: The clients in the data differ from ``clients``, or the site has several
            clients and ``data.client_column`` is not set.
    """
    path = Path(data.path).expanduser()
    in_folder = folder / path
    defaults = {
        "train_split": "train",
        "validation_split": None,
        "test_split": None,
        "config": None,
        "revision": None,
    }
    overrides = {
        "path": str(in_folder) if in_folder.exists() else data.path,
        "separator": data.separator,
        "quoting": data.quoting,
        "encoding": data.encoding,
        "split_column": data.split_column,
        "filter": data.filter,
    }
    overrides |= {
        key: value
        for key in ("validation_fraction", "test_fraction")
        if (value := getattr(data, key)) is not None
    }
    column = data.client_column
    scheme = (
        IidRecipe(scheme="iid", clients=1)
        if column is None
        else NaturalRecipe(scheme="natural", by=column, group=data.group_column)
    )
    if column is None and len(clients) > 1:
        raise FederateError(
            f"{SITE_FILE}: the federation has {len(clients)} clients at this site; "
            "name the column that distinguishes them: data.client_column"
        )
    label = recipe.task.label_column
    site_data = federate_data(
        recipe.data.model_copy(update={**defaults, **overrides, "partition": scheme}),
        label,
        recipe.seed,
        recipe.task.media_column,
        whole=False,
    )
    if column is None:
        (client,) = site_data.clients
        return FederatedData(site_data.table, [replace(client, name=clients[0], group="")])
    by_name = {client.name: client for client in site_data.clients}
    if by_name.keys() != set(clients):
        missing = [name for name in clients if name not in by_name]
        further = [name for name in by_name if name not in clients]
        differences = [
            *[f"lacks {join_values(missing)}"] * bool(missing),
            *[f"has {join_values(further)} in addition"] * bool(further),
        ]
        raise FederateError(
            f"{SITE_FILE}: data.client_column: the clients in column {column} are not those that "
            f"the federation has at this site: it {' and '.join(differences)}; correct the column, "
            "or create kits with the clients of each site (federate prepare)"
        )
    return FederatedData(site_data.table, [by_name[name] for name in clients])


def check_data(data: FederatedData, checks: SiteChecks) -> None:
    """Raise ``RefusedError`` if the data do not meet the site's requirements."""
    for client in data.clients:
        if client.size < checks.min_examples:
            raise RefusedError(
                f"client {client.name} has {client.size} training "
                f"example{'s' * (client.size != 1)}, and checks.min_examples in {SITE_FILE} is "
                f"{checks.min_examples}; add examples, or lower the limit"
            )
        if (
            checks.max_repeated < 1
            and (repeated := _repeated_fraction(data.table, client)) > checks.max_repeated
        ):
            raise RefusedError(
                f"client {client.name}: {100 * repeated:.4g} % of its rows repeat another row, and "
                f"checks.max_repeated in {SITE_FILE} is {checks.max_repeated:g}; "
                "remove the repeated rows, or raise the limit"
            )


def _repeated_fraction(table: Dataset, client: Client) -> float:
    """Return the fraction of a client's rows that equal an earlier row."""
    rows = np.concatenate([client.train, client.validation, client.test])
    distinct = {repr(row) for row in table.select(rows)}
    return 1 - len(distinct) / len(rows)


def site_summary(data: FederatedData, recipe: Recipe) -> SiteSummary:
    """Summarize a site's data. Raises ``DataError`` if they do not fit the task."""
    clients = tuple(
        {
            "name": client.name,
            "group": client.group,
            "train": client.size,
            "validation": len(client.validation),
            "test": len(client.test),
        }
        for client in data.clients
    )
    kind = task_type(recipe.task)
    labels = kind.labels_in(recipe.task, data.table)
    return SiteSummary(
        clients,
        None if labels is None else tuple(labels),
        kind.format_in(recipe.task, data.table),
        tuple(data.table.column_names),
    )


def agree_on_labels(
    site_labels: Sequence[Sequence[str]], num_labels: int | None, *, one_each: bool = True
) -> list[str]:
    """Return the labels of a federation, in the order of their ids.

    If the longest list contains all names, the labels keep its order; otherwise they are sorted.
    With ``num_labels``, integers below it are their own ids, so a label that no site has yet can
    occur later. Other lists are filled up to ``num_labels`` with placeholders ``LABEL_k``.

    Args:
        site_labels: Names of the labels of each site.
        num_labels: ``task.num_labels``; None if the recipe does not set it.
        one_each: True if each example, or each of its words, has exactly one label. With a single
            label, there is then nothing to learn.

    Raises:
        FederateError: There are more labels than ``num_labels``; or, with ``one_each``, there is
            only one label.
    """
    longest = max((list(labels) for labels in site_labels), key=len)
    union = {label for labels in site_labels for label in labels}
    if one_each and len(union) == 1:
        raise FederateError(
            f"task: the examples of all sites have the label {join_values(union)}, so there is "
            "nothing to learn; correct the label column in task, or the sites' data.filter"
        )
    labels = longest if union == set(longest) else sorted(union)
    if num_labels is None:
        return labels
    if len(labels) > num_labels:
        raise FederateError(
            f"task.num_labels is {num_labels}, and the sites have {len(labels)} labels: "
            f"{join_values(labels)}; raise it, or remove it to infer the labels"
        )
    numbers = [str(label) for label in range(num_labels)]
    if union <= set(numbers):
        return numbers
    return [*labels, *(f"LABEL_{label}" for label in range(len(labels), num_labels))]


def with_label_ids(data: FederatedData, recipe: Recipe, labels: Sequence[str]) -> FederatedData:
    """Return the data with the federation's label ids. Raises ``DataError`` for unknown labels."""
    table = task_type(recipe.task).relabel(recipe.task, data.table, labels)
    return FederatedData(table, data.clients)


# ---- rehearsals ----------------------------------------------------------------------------------


def split_clients(data: FederatedData, sites: int) -> dict[str, list[str]]:
    """Split the clients over sites as evenly as possible, in order; return names by site.

    Raises:
        DataError: There are fewer clients than sites.
    """
    names = [client.name for client in data.clients]
    if len(names) < sites:
        raise DataError(
            f"--sites {sites}: the recipe has {len(names)} client{'s' * (len(names) != 1)}, and "
            "each site needs one; reduce --sites"
        )
    return {
        f"site-{number}": list(part)
        for number, part in enumerate(np.array_split(np.array(names, dtype=object), sites), start=1)
    }


def write_site_data(
    data: FederatedData, clients: Sequence[str], kit: Path, settings: Mapping[str, Any]
) -> None:
    """Write the examples of some clients into a site's kit, with a matching ``site.yaml``.

    Args:
        data: The examples of all clients.
        clients: Names of the site's clients.
        kit: The site's kit. The examples are written to ``data.parquet`` in it, with columns for
            client, split and group.
        settings: Further keys of ``site.yaml``.
    """
    site_clients = [client for client in data.clients if client.name in clients]
    rows, columns = [], {CLIENT_COLUMN: [], SPLIT_COLUMN: [], GROUP_COLUMN: []}  # type: ignore[var-annotated]
    for client in site_clients:
        for split, part in (
            ("train", client.train),
            ("validation", client.validation),
            ("test", client.test),
        ):
            rows.append(part)
            for column, value in (
                (CLIENT_COLUMN, client.name),
                (SPLIT_COLUMN, split),
                (GROUP_COLUMN, client.group),
            ):
                columns[column] += [value] * len(part)
    table = data.table.select(np.concatenate(rows))
    with no_progress_bars():
        for column, values in columns.items():
            table = table.add_column(column, values)
        table.to_parquet(kit / "data.parquet")
    document = {
        "data": {
            "path": "data.parquet",
            "client_column": CLIENT_COLUMN,
            "group_column": GROUP_COLUMN,
            "split_column": SPLIT_COLUMN,
            "validation_fraction": 0.0,
            "test_fraction": 0.0,
        },
        **settings,
    }
    write_text(kit / SITE_FILE, yaml_document.write(document))
