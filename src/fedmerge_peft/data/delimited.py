"""Read csv and tsv files. If a row cannot be read, the error names its line."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyarrow as pa

from fedmerge_peft.data.columns import join_values
from fedmerge_peft.errors import DataError
from fedmerge_peft.util.text import shortened

if TYPE_CHECKING:
    from fedmerge_peft.recipe.data import Quoting

logger = logging.getLogger(__name__)

_SEPARATORS = (",", ";", "\t", "|")
_HINT = re.compile(r'"?sep=.?"?[\r\n]')
"""First line that sets the separator for spreadsheet programs, such as ``sep=;``."""


class _Record(NamedTuple):
    """Fields of one row, and the numbers of its first and last line in the file, from 1."""

    first: int
    last: int
    fields: list[str]


def read_delimited(path: Path, text: str, separator: str, quoting: Quoting) -> pa.Table:
    """Split the text of a file into columns of text.

    The first row contains the column names. Empty fields are nulls. Rows without any value are
    skipped. If a space follows a separator in the first line, spaces after separators are ignored
    in all lines.

    With ``quoting: auto``, quotation marks enclose fields, as RFC 4180 defines. If a tab-separated
    file cannot be parsed in this way, its quotation marks are read as text. A file with several
    columns is ambiguous if a quoted field spans several lines, but each line is also a complete
    row.

    Args:
        path: File, for error messages.
        text: Content of the file.
        separator: Character between fields.
        quoting: ``auto``; ``double`` if quotation marks enclose fields; ``none`` if they are text.

    Raises:
        DataError: The file is empty or ambiguous, or has another separator; a row has more or fewer
            fields than the first, or repeats it; a quoted field does not end, or is followed by
            text; two columns have the same name; or the first line is a hint for spreadsheets. The
            message names the line, unless the file is empty.
    """
    records = _records(path, text, separator, quoting)
    if not records:
        raise DataError(f"data.path: {path} is empty; add a first row with the column names")
    header, *rows = records
    _reject_repeated_header(path, header, rows)
    names = [name.strip() or f"Unnamed: {number}" for number, name in enumerate(header.fields)]
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise DataError(
            f"data.path: {path}:{header.first}: two columns are named {repeated!r}; rename one"
        )
    columns = zip(*(record.fields for record in rows), strict=True) if rows else [()] * len(names)
    return pa.table(
        [pa.array([field or None for field in column], pa.string()) for column in columns],
        names=names,
    )


def _records(path: Path, text: str, separator: str, quoting: Quoting) -> list[_Record]:
    """Return the rows that contain at least one value, all with the same number of fields."""
    if quoting == "none":
        return _parse(path, text, separator, quoted=False)
    try:
        records = _parse(path, text, separator, quoted=True)
    except DataError:
        if quoting == "double" or separator != "\t":
            raise
        records = _parse(path, text, separator, quoted=False)
        logger.warning(
            "%s: quotation marks are read as text, as they do not enclose whole fields; set "
            "data.quoting=none if this is right, or data.quoting=double to see the faulty line",
            path,
        )
        return records
    long = next((record for record in records if record.last > record.first), None)
    if quoting == "double" or long is None or len(long.fields) == 1:
        return records
    try:
        _parse(path, text, separator, quoted=False)
    except DataError:
        return records
    raise DataError(
        f"data.path: {path}:{long.first}: a quotation mark opens a field that ends in line "
        f"{long.last}, but each of these lines is also a complete row; set data.quoting=none if "
        "quotation marks are text, or data.quoting=double if fields may span lines"
    )


def _reject_repeated_header(path: Path, header: _Record, rows: Sequence[_Record]) -> None:
    """Raise ``DataError`` if a row repeats the column names, as in concatenated files."""
    several = len(header.fields) > 1  # in a single column, a text may equal the column name
    for row in rows if several else ():
        if [field.removeprefix("\ufeff") for field in row.fields] == header.fields:
            raise DataError(
                f"data.path: {path}:{row.first}: the row equals the first one, which names the "
                "columns; remove this row if files were joined, or, if the first row is data, add "
                "a row of column names before it"
            )


def _parse(path: Path, text: str, separator: str, *, quoted: bool) -> list[_Record]:
    if _HINT.match(text):
        raise DataError(
            f"data.path: {path}:1: {text.splitlines()[0]!r} is a hint for spreadsheets, not a row; "
            "remove the line, and set data.separator to the separator that it names, unless the "
            "file's suffix implies it (a comma for .csv, a tab for .tsv)"
        )
    reader = csv.reader(
        io.StringIO(text, newline=""),
        delimiter=separator,
        quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        skipinitialspace=f"{separator} " in next(iter(text.splitlines()), ""),
        strict=True,
    )
    records: list[_Record] = []
    last = 0
    with _no_field_limit():
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return records
            except csv.Error as error:
                raise DataError(
                    f"data.path: {path}:{last + 1}: {_reason(error)}; write a quotation mark "
                    "inside a quoted field twice, or set data.quoting=none if quotation marks are "
                    "text"
                ) from error
            first, last = last + 1, reader.line_num
            if any(fields):
                records.append(_Record(first, last, fields))
                if len(records) == 1 and len(fields) == 1:
                    _reject_other_separator(path, first, fields[0], separator)
                _check_width(path, records, separator, quoted=quoted)


def _check_width(path: Path, records: Sequence[_Record], separator: str, *, quoted: bool) -> None:
    """Raise ``DataError`` if the row that was read last has more or fewer fields than the first."""
    names, row = records[0].fields, records[-1]
    if len(row.fields) != len(names):
        example = "," if separator == ";" else ";"
        quote = f"enclose fields that contain {separator!r} in quotation marks, " if quoted else ""
        fields = f"{len(row.fields)} field{'s' * (len(row.fields) != 1)}"
        columns = f"{len(names)} column{'s' * (len(names) != 1)}"
        raise DataError(
            f"data.path: {path}:{row.first}: the row has {fields}, but the first "
            f"row names {columns} ({shortened(join_values(names, 3), 80)}); "
            f'{quote}set data.separator (such as data.separator="{example}"), or remove lines that '
            "are not rows"
        )


def _reason(error: csv.Error) -> str:
    if "unexpected end" in str(error):
        return "a quotation mark opens a field that does not end"
    if "expected after" in str(error):
        return "a quoted field is followed by text"
    return str(error)


def _reject_other_separator(path: Path, line: int, name: str, separator: str) -> None:
    others = [other for other in _SEPARATORS if other in name]
    if others:
        raise DataError(
            f"data.path: {path}:{line}: with the separator {separator!r}, the first row is a "
            f"single field, {shortened(name, 80)!r}; if {others[0]!r} separates the fields, set "
            f"data.separator={others[0]!r}, else remove it from the name of the column"
        )


@contextmanager
def _no_field_limit() -> Iterator[None]:
    """Lift csv's limit of 128 KiB per field inside the context."""
    limit = csv.field_size_limit(2**31 - 1)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
