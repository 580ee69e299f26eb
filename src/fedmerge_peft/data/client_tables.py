"""Join the tables of single clients into one table per split, with a column of client names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.data.tables import PATH_KEY, common_schema
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe

if TYPE_CHECKING:
    from datasets import Dataset, Features

_BATCH = 1_000
"""Number of rows that are converted to Python objects at a time."""


@dataclass(frozen=True)
class ClientTables:
    """Tables of one client by split."""

    name: str
    source: str
    """Name of the tables in error messages."""
    splits: Mapping[str, Dataset]


def client_column(recipe: DataRecipe) -> str:
    """Return the column that names clients: the partition scheme's column, else ``client``."""
    return recipe.partition.client_column or "client"


def join_clients(
    clients: Sequence[ClientTables], column: str, key: str = PATH_KEY
) -> dict[str, Dataset]:
    """Join the tables of clients by split, and add a column that names the client of each row.

    Args:
        clients: Tables of each client.
        column: Name of the column.
        key: Beginning of error messages; empty for tables in memory.

    Raises:
        DataError: Clients have different splits or columns; a column has no common type; in the
            tables of a client, ``column`` exists and names another client.
    """
    from datasets import concatenate_datasets

    first = clients[0]
    tables: dict[tuple[str, str], Dataset] = {}
    for client in clients:
        if client.splits.keys() != first.splits.keys():
            raise DataError(
                f"{key}{client.source} has the split{'s' * (len(client.splits) != 1)} "
                f"{join_values(client.splits)}, but {first.source} has "
                f"{join_values(first.splits)}; give all clients the same splits"
            )
        for split, table in client.splits.items():
            tables[client.source, split] = _with_client(table, column, client, key)
    parts: dict[str, list[Dataset]] = {}
    for (_, split), table in _aligned(tables, key).items():
        parts.setdefault(split, []).append(table)
    return {split: concatenate_datasets(pieces) for split, pieces in parts.items()}


def column_values(table: Dataset, column: str) -> Iterator[list[Any]]:
    """Yield the values of a column, as one list per batch of rows. Images are not decoded."""
    for batch in table.select_columns([column]).with_format("arrow").iter(_BATCH):
        yield batch.column(column).to_pylist()


def _with_client(table: Dataset, column: str, client: ClientTables, key: str) -> Dataset:
    """Add the column that names the client; if it exists, check that it names only this client."""
    if column in table.column_names:
        for values in column_values(table, column):
            if others := [value for value in values if str(value) != client.name]:
                raise DataError(
                    f"{key}{client.source}: the column {column} names the client, but it has "
                    f"{others[0]!r}; write {client.name!r} in all rows, or remove the column"
                )
        return table
    return table.add_column(column, [client.name] * len(table))


def _aligned(tables: Mapping[tuple[str, str], Dataset], key: str) -> dict[tuple[str, str], Dataset]:
    """Convert all tables to common column types.

    Raises ``DataError`` if tables have different columns, or a column has no common type.
    """
    from datasets import Features

    sources = {
        f"{source}: {split}": table.features.arrow_schema
        for (source, split), table in tables.items()
    }
    schema = common_schema(sources, key)
    first = next(iter(tables.values())).features

    def feature(name: str) -> Any:
        if all(table.features[name] == first[name] for table in tables.values()):
            return first[name]
        return Features.from_arrow_schema(pa.schema([schema.field(name)]))[name]

    features = Features({name: feature(name) for name in schema.names})
    return {source: _cast(table, features) for source, table in tables.items()}


def _cast(table: Dataset, features: Features) -> Dataset:
    table = table.select_columns(list(features))
    return table if table.features == features else table.cast(features)
