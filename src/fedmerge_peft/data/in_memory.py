"""Convert examples from a Python program to splits, as if they came from files.

The examples are one table, the splits of a table, or a mapping from clients to their tables. Pandas
frames and Arrow tables are checked and converted like files; a ``datasets.Dataset`` is used as it
is. A recipe refers to the examples by their fingerprint.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from math import isnan
from typing import TYPE_CHECKING, Any, TypeAlias

import pyarrow as pa

from fedmerge_peft.data.client_tables import (
    ClientTables,
    client_column,
    column_values,
    join_clients,
)
from fedmerge_peft.data.columns import encode_classes, join_values
from fedmerge_peft.data.loading import IN_MEMORY, no_progress_bars
from fedmerge_peft.data.tables import check_names, plain_table, reading
from fedmerge_peft.errors import DataError
from fedmerge_peft.recipe.data import DataRecipe, NaturalRecipe
from fedmerge_peft.recipe.error_messages import found
from fedmerge_peft.util.text import is_encodable

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, DatasetDict

    Table: TypeAlias = Dataset | pd.DataFrame | pa.Table
    Parts: TypeAlias = Table | DatasetDict | tuple[Table, Table]
    Data: TypeAlias = Parts | Mapping[str, Parts]
    """One table, a pair (train, test) or a ``DatasetDict``; or a mapping from clients to these."""


def take_data(
    recipe: DataRecipe, data: Data, label: str | None = None
) -> tuple[DataRecipe, dict[str, Dataset]]:
    """Convert examples in memory to splits.

    The keys of a mapping are the clients. With the natural scheme, they are stored in its column
    ``by``. With another scheme, they are stored in the column ``client``, and a natural partition
    by this column replaces the recipe's partition.

    Args:
        recipe: Names of the splits, and the partition.
        data: The examples.
        label: Label column of the task. If it is given and the recipe has no filter, the labels of
            each key of a mapping are checked, so that errors name the client.

    Returns:
        The recipe with the fingerprint of the examples as ``path``, and the splits by name.

    Raises:
        DataError: A table has an unsupported type or invalid columns; there are no rows, or a
            client has no training rows; a data set has a transform; a mapping is empty; a key is
            None, NaN, blank or not valid Unicode, two keys are the same as text, or all keys are
            names of splits; the tables of clients differ in columns
            or splits, or name other clients; labels are missing. If the fault is in the table of
            one client, the message names this client.
    """
    with no_progress_bars():
        if isinstance(data, Mapping) and not _is_dataset_dict(data):
            recipe, splits = _join_clients(recipe, data, label)
        else:
            splits = read_parts(data, recipe)
            if not any(map(len, splits.values())):
                raise DataError("data: there are no rows; pass a table with examples")
        return recipe.model_copy(update={"path": f"{IN_MEMORY}:{fingerprint(splits)}"}), splits


def read_parts(parts: Parts, recipe: DataRecipe, source: str = "data") -> dict[str, Dataset]:
    """Convert a table, a pair (train, test) or a ``DatasetDict`` to data sets by split.

    Args:
        parts: The tables.
        recipe: Names of the splits.
        source: Name of the tables in error messages.

    Raises:
        DataError: A table has an unsupported type or invalid columns.
    """
    if isinstance(parts, tuple) and len(parts) == 2:
        names = (recipe.train_split, recipe.test_split or "test")
        pairs = zip(names, parts, strict=True)
        return {name: _read(part, f"{source}: {name}") for name, part in pairs}
    if _is_dataset_dict(parts):
        return {name: _read(part, f"{source}: {name}") for name, part in dict(parts).items()}
    several = ", or several splits as a DatasetDict or a pair (train, test)"
    return {recipe.train_split: _read(parts, source, several)}


def fingerprint(splits: Mapping[str, Dataset]) -> str:
    """Return the first 16 hexadecimal digits of the SHA-256 sum of all values.

    The sum includes the names of splits, columns and classes, and the numbers of rows. It does not
    depend on the order of columns, or on differences of Arrow types that do not change Python
    values, such as string and large_string. A path counts as text; its file is not read.
    """
    digest = sha256()
    for split, table in sorted(splits.items()):
        for column in sorted(table.column_names):
            names = getattr(table.features[column], "names", None)
            digest.update(repr((split, column, len(table), names)).encode())
            for values in column_values(table, column):
                digest.update(repr(values).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:16]


# ---- tables --------------------------------------------------------------------------------------


def _read(table: Any, source: str, alternatives: str = "") -> Dataset:
    import pandas as pd
    from datasets import Dataset

    if isinstance(table, Dataset):
        check_names(source, table.column_names, key="")
        if table.format["type"] == "custom":
            raise DataError(
                f"{source}: the data set has a transform (set_transform, with_transform), which "
                "would not be applied, because only stored values are read; apply it with map, or "
                "remove it with reset_format"
            )
        return table.with_format(None)
    if not isinstance(table, pd.DataFrame | pa.Table):
        raise DataError(
            f"{source}: found {found(table)}, expected a datasets.Dataset, a pandas frame or an "
            f"Arrow table{alternatives}"
        )
    with reading(source, key=""):
        check_names(source, [str(name) for name in table.columns], key="")
        arrow = (
            pa.Table.from_pandas(table, preserve_index=False)
            if isinstance(table, pd.DataFrame)
            else table
        )
        return Dataset(plain_table(arrow, source, key=""))


def _is_dataset_dict(data: object) -> bool:
    from datasets import DatasetDict

    return isinstance(data, DatasetDict)


# ---- clients -------------------------------------------------------------------------------------


def _join_clients(
    recipe: DataRecipe, data: Mapping[str, Parts], label: str | None
) -> tuple[DataRecipe, dict[str, Dataset]]:
    """Join the tables of clients by split, and add a column that names the client of each row."""
    _check_clients(recipe, data)
    by = client_column(recipe)
    splits = join_clients(_client_tables(recipe, data, label), by, key="")
    if recipe.partition.client_column is None:
        recipe = recipe.model_copy(update={"partition": NaturalRecipe(scheme="natural", by=by)})
    return recipe, splits


def client_name(key: Any) -> str:
    """Return a client's name; a tuple, such as a key of ``groupby([...])``, is joined by commas."""
    return ", ".join(map(str, key)) if isinstance(key, tuple) else str(key)


def _is_missing(key: Any) -> bool:
    return key is None or (isinstance(key, float) and isnan(key))


def _check_clients(recipe: DataRecipe, data: Mapping[str, Parts]) -> None:
    keys: list[Any] = list(data)
    texts = [client_name(key) for key in keys]
    if any(_is_missing(key) or not text.strip() for key, text in zip(keys, texts, strict=True)):
        raise DataError(
            "data: a client has no name (None, NaN or blank); groupby(..., dropna=False) makes "
            "such a client from rows without a name; name the client, or leave it out"
        )
    if (invalid := next((text for text in texts if not is_encodable(text)), None)) is not None:
        raise DataError(
            f"data: the client name {invalid!a} has half of a character (an unpaired surrogate); "
            "correct the name"
        )
    names = set(texts)
    splits = {"train", "validation", "test", recipe.train_split}
    if not names:
        raise DataError("data: the dictionary is empty; pass one entry per client")
    if len(names) < len(data):
        repeated = next(text for text in texts if texts.count(text) > 1)
        first, second = [key for key in keys if client_name(key) == repeated][:2]
        raise DataError(
            f"data: the keys {first!r} and {second!r} name the same client, {repeated}; give each "
            "client its own name"
        )
    if names <= splits:
        raise DataError(
            "data: the keys of a dictionary are clients, but here they are names of splits "
            f"({join_values(sorted(names))}); pass splits as datasets.DatasetDict or as a pair "
            "(train, test)"
        )


def _client_tables(
    recipe: DataRecipe, data: Mapping[str, Parts], label: str | None
) -> list[ClientTables]:
    """Convert the tables of each client, and check its training rows and labels."""
    tables = []
    for key, parts in data.items():
        source = f"data[{key!r}]"
        splits = read_parts(parts, recipe, source)
        if not len(splits.get(recipe.train_split, ())) and recipe.train_split in splits:
            raise DataError(f"{source} has no training rows; add some, or leave the client out")
        if label is not None and not recipe.filter and "train" in splits:
            encode_classes(splits, label, f"{source}: task.label")
        tables.append(ClientTables(client_name(key), source, splits))
    return tables
