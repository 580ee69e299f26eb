"""Clients in separate files or folders: ``clients/*.csv``, ``hospitals/*/``."""

from __future__ import annotations

from collections.abc import Mapping
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING

from fedmerge_peft.data.client_tables import ClientTables, client_column, join_clients
from fedmerge_peft.data.local_files import read_local, read_table_files
from fedmerge_peft.data.tables import TABLES, is_table, reading
from fedmerge_peft.data.text_files import format_suffix
from fedmerge_peft.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset

    from fedmerge_peft.recipe.data import DataRecipe


def is_pattern(path: Path) -> bool:
    """Return True if a path has wildcards, and is not itself the path of a file or folder."""
    return any(character in str(path) for character in "*?[") and not path.exists()


def read_clients(pattern: Path, recipe: DataRecipe, media: str | None) -> dict[str, Dataset]:
    """Read one file or folder per client.

    A client has the name of its folder, or of its file without the suffix, such as ``.csv.gz``. A
    column that names the client of each row is added, unless it exists (``client_column``). Folders
    are read with ``read_local``; class numbers, such as the labels of images, are replaced by class
    names.

    Raises:
        DataError: Nothing matches the pattern; it matches a file that is not a table, or both files
            and folders; a file or folder cannot be read or has no rows; two clients have the same
            name, or differ in splits or columns; a column has no common type; a row names another
            client.
    """
    paths = _matches(pattern)
    if all(path.is_dir() for path in paths.values()):
        folders = {
            name: _with_label_names(read_local(path, recipe, media)) for name, path in paths.items()
        }
        clients = [ClientTables(name, str(paths[name]), parts) for name, parts in folders.items()]
    else:
        files = [path for path in paths.values() if path.is_file()]
        if others := [path for path in paths.values() if path not in files or not is_table(path)]:
            raise DataError(
                f"data.path: {pattern} matches {others[0]}, which is not a table; let the pattern "
                f"match only tables ({', '.join(TABLES)}), or only folders"
            )
        with reading(pattern):
            tables = read_table_files(files, recipe, media)
        clients = [
            ClientTables(name, str(path), {"train": tables[path]}) for name, path in paths.items()
        ]
    for client in clients:
        if not any(map(len, client.splits.values())):
            raise DataError(f"data.path: {client.source} has no rows; add some, or remove it")
    return join_clients(clients, client_column(recipe))


def _matches(pattern: Path) -> dict[str, Path]:
    """Return the file or folder of each client by name, in the order of the paths."""
    paths = [Path(path) for path in sorted(glob(str(pattern)))]  # noqa: PTH207 - absolute too
    if not paths:
        raise DataError(f"data.path: nothing matches {pattern.absolute()}; correct the pattern")
    named: dict[str, Path] = {}
    for path in paths:
        suffix = "" if path.is_dir() else format_suffix(path)
        name = path.name[: path.name.lower().rfind(suffix)] if suffix else path.name
        if name in named:
            raise DataError(
                f"data.path: {named[name]} and {path} both belong to the client {name}; rename one"
            )
        named[name] = path
    return named


def _with_label_names(splits: Mapping[str, Dataset]) -> dict[str, Dataset]:
    """Replace class numbers, whose meaning differs between folders, by class names.

    A missing number becomes a missing value, as does a number that has no name, such as -1.
    """
    from datasets import Value

    named = {}
    for split, table in splits.items():
        for column, feature in table.features.items():
            if hasattr(feature, "names"):
                names = [
                    feature.names[number]
                    if number is not None and 0 <= number < len(feature.names)
                    else None
                    for number in table[column]
                ]
                position = table.column_names
                table = table.remove_columns(column).add_column(column, names)
                table = table.select_columns(position).cast_column(column, Value("string"))
        named[split] = table
    return named
