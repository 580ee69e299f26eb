"""Read tables of all supported formats, with the same columns and types in all files."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fedmerge_peft.data.column_types import json_column, plain_column, type_texts
from fedmerge_peft.data.columns import LONGEST_NAME, class_label, join_values
from fedmerge_peft.data.delimited import read_delimited
from fedmerge_peft.data.json_rows import JsonRow, read_json
from fedmerge_peft.data.text_files import format_suffix, read_text
from fedmerge_peft.errors import DataError
from fedmerge_peft.util.foreign_files import foreign_content

if TYPE_CHECKING:
    from fedmerge_peft.recipe.data import DataRecipe

logger = logging.getLogger(__name__)

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_JSON = (".json", ".jsonl", ".ndjson")
_BINARY = (".parquet", ".arrow", ".feather")
TABLES = (*_SEPARATORS, *_JSON, *_BINARY)
"""Suffixes of tables. A compression suffix may follow the suffix of a text format: ``.csv.gz``."""
MAX_COLUMNS = 5_000
PATH_KEY = "data.path: "
"""Beginning of errors of files. Errors of tables in memory begin with their names, such as
``data['Fen Water']: train``."""
_ABOUT = {"dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
"""Files with the metadata of a data set."""


def is_table(path: Path) -> bool:
    """Return True if a file name has the suffix of a supported table.

    Metadata files of data sets and compressed binary tables are not supported.
    """
    suffix = format_suffix(path)
    compressed = path.suffix.lower() != suffix
    return suffix in TABLES and path.name not in _ABOUT and not (compressed and suffix in _BINARY)


def read_tables(
    files: Sequence[Path], recipe: DataRecipe, texts: Set[str] = frozenset()
) -> dict[Path, pa.Table]:
    """Read tables.

    Column types are inferred from all csv and tsv files together, and from all JSON files together.

    Args:
        files: One or more files with a suffix in ``TABLES``.
        recipe: The section ``data``, with the separator, quoting and encoding of text files.
        texts: Columns that stay text in csv and tsv files, without inference of their types.

    Returns:
        Table of each file, all with the same schema.

    Raises:
        DataError: A file cannot be read, or files differ in columns or have incompatible types.
            The message names the files and, if one row is at fault, its line or its number.
    """
    tables: dict[Path, pa.Table] = {}
    for suffixes, read in _READERS:
        paths = [path for path in files if format_suffix(path) in suffixes]
        tables |= zip(paths, read(paths, recipe, texts) if paths else [], strict=True)
    schema = common_schema({path: tables[path].schema for path in files})
    for path, table in tables.items():
        with reading(path):
            tables[path] = table.select(schema.names).cast(schema)
    return tables


@contextmanager
def reading(source: object, key: str = PATH_KEY) -> Iterator[None]:
    """Convert every error of a reader to a ``DataError`` that names the source after ``key``."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # readers raise arbitrary errors for broken files and networks
        raise DataError(f"{key}{source} cannot be loaded: {_describe_error(error)}") from error


def _describe_error(error: BaseException) -> str:
    """Return an error as one line; a ``DatasetGenerationError`` is replaced by its cause."""
    while type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _delimited(paths: Sequence[Path], recipe: DataRecipe, texts: Set[str]) -> list[pa.Table]:
    read: dict[Path, pa.Table] = {}
    for path in paths:
        with reading(path):
            separator = recipe.separator or _SEPARATORS[format_suffix(path)]
            text = read_text(path, recipe.encoding)
            read[path] = read_delimited(path, text, separator, recipe.quoting)
            check_names(path, read[path].column_names)
    names = common_schema({path: table.schema for path, table in read.items()}).names
    together = pa.concat_tables([table.select(names) for table in read.values()])
    columns = [
        column if name in texts else type_texts(column)
        for name, column in zip(names, together.columns, strict=True)
    ]
    return _cut(pa.table(columns, names=names), [len(table) for table in read.values()])


def _json(paths: Sequence[Path], recipe: DataRecipe, texts: Set[str]) -> list[pa.Table]:
    rows: list[JsonRow] = []
    sizes = []
    for path in paths:
        with reading(path):
            read = read_json(path, read_text(path, recipe.encoding))
            check_names(path, list(dict.fromkeys(name for row in read for name in row.values)))
        rows += read
        sizes.append(len(read))
    columns = {
        name: json_column(
            [row.values.get(name) for row in rows],
            name,
            lambda number: rows[number].place,
            key=PATH_KEY,
        )
        for name in dict.fromkeys(name for row in rows for name in row.values)
    }
    return _cut(pa.table(columns), sizes)


def _binary(paths: Sequence[Path], recipe: DataRecipe, texts: Set[str]) -> list[pa.Table]:
    tables = []
    for path in paths:
        with reading(path):
            parquet = format_suffix(path) == ".parquet"
            if kind := foreign_content(path, b"PAR1" if parquet else b"ARROW1"):
                what, _, advice = kind.partition("; ")
                if what.startswith("compressed"):  # only text formats may stay compressed
                    advice = "decompress it"
                raise DataError(f"data.path: {path} is {what}; {advice}")
            table = _read_parquet(path) if parquet else _read_arrow(path)
            check_names(path, table.column_names)
            tables.append(plain_table(table, path))
    return tables


_READERS: tuple[tuple[Sequence[str], Any], ...] = (
    (tuple(_SEPARATORS), _delimited),
    (_JSON, _json),
    (_BINARY, _binary),
)


def _read_parquet(path: Path) -> pa.Table:
    from pyarrow import parquet

    return parquet.ParquetFile(path).read()


def _read_arrow(path: Path) -> pa.Table:
    from pyarrow import ipc

    with pa.memory_map(str(path)) as source:
        try:
            return ipc.open_file(source).read_all()
        except pa.ArrowInvalid:  # Arrow's streaming format
            source.seek(0)
            return ipc.open_stream(source).read_all()


def plain_table(table: pa.Table, path: Path | str, key: str = PATH_KEY) -> pa.Table:
    """Convert columns of uncommon types (``plain_column``) to types that ``datasets`` supports.

    Columns whose type ``datasets`` does not support even then are left out, with a warning.

    Args:
        table: The table.
        path: File or name of the table, for messages.
        key: Beginning of error messages.

    Raises:
        DataError: The values of a column of Arrow's JSON type are invalid (``plain_column``).
    """
    from datasets import Features

    for number, field in enumerate(table.schema):
        column = plain_column(
            table.column(number),
            field.name,
            lambda row: f"{path}, row {row + 1}",
            key=key,
        )
        if column.type != field.type:
            table = table.set_column(number, pa.field(field.name, column.type), column)
    for field in table.schema:
        try:
            Features.from_arrow_schema(pa.schema([field]))
        except ValueError:
            logger.warning(
                "%s: the column %s is left out, as its type is not supported: %s",
                path,
                field.name,
                field.type,
            )
            table = table.drop_columns(field.name)
    return table


def _cut(table: pa.Table, sizes: Sequence[int]) -> list[pa.Table]:
    """Split a table of several files into one table per file, by their numbers of rows."""
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [table.slice(start, size) for start, size in zip(starts, sizes, strict=True)]


def check_names(path: Path | str, names: Sequence[str], key: str = PATH_KEY) -> None:
    """Raise ``DataError`` for too many columns, a name that is too long, or a repeated name.

    The message begins with ``key`` and the file or the name of the table.
    """
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{key}{path} has {len(names):,} columns, and at most {MAX_COLUMNS:,} are "
            "supported; keep only the columns that the recipe names"
        )
    if len(longest := max(names, key=len, default="")) > LONGEST_NAME:
        raise DataError(
            f"{key}{path} has a column with a name of {len(longest):,} characters "
            f"({longest[:30]!r}…), and at most {LONGEST_NAME:,} are supported; shorten the name "
            "(in a csv or tsv file, the first row may be data instead of names)"
        )
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{key}{path}: two columns are named {repeated!r}; rename one")


def common_schema(schemas: Mapping[Any, pa.Schema], key: str = PATH_KEY) -> pa.Schema:
    """Return the schema to which all tables can be converted.

    Args:
        schemas: Schemas of one or more tables, by the file or name for error messages.
        key: Beginning of error messages; empty for tables in memory.

    Raises:
        DataError: Tables have different columns, or a column has different class names or types
            without a common type.
    """
    (first, schema), *others = schemas.items()
    for number, (path, other) in enumerate(others, start=1):
        if differ := sorted(set(schema.names) ^ set(other.names)):
            raise DataError(
                f"{key}{path} and {first} have different columns ({join_values(differ, 5)} "
                "in one of them only); give them the same columns, or leave one of them out"
            )
        for name in schema.names:
            if _fit(schema, other, name):
                continue
            # A column of nulls has no type, so the conflict need not be with the first table.
            earlier = [*schemas.items()][:number]
            conflicts = (pair for pair in earlier if not _fit(pair[1], other, name))
            source, own = next(conflicts, (first, schema))
            raise DataError(
                f"{key or 'data: '}the column {name!r} is {_type(own, name, other)} in {source}, "
                f"but {_type(other, name, own)} in {path}; give it the same type in both, or leave "
                "one of them out"
            )
        schema = pa.unify_schemas([schema, other], promote_options="permissive")
    return schema


def _fit(schema: pa.Schema, other: pa.Schema, name: str) -> bool:
    """Return True if a column has the same class names and types with a common type."""
    if _class_names(schema, name) != _class_names(other, name):
        return False
    fields = [pa.schema([one.field(name)]) for one in (schema, other)]
    try:
        pa.unify_schemas(fields, promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _class_names(schema: pa.Schema, name: str) -> list[str] | None:
    from datasets import Features

    if not schema.metadata or b"huggingface" not in schema.metadata:
        return None
    return getattr(Features.from_arrow_schema(schema)[name], "names", None)


def _type(schema: pa.Schema, name: str, other: pa.Schema) -> str:
    names = _class_names(schema, name)
    if names is None:
        return str(schema.field(name).type)
    return class_label(names, _class_names(other, name))
