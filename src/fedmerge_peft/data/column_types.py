"""Infer column types from all rows of all files, and convert columns of uncommon Arrow types."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from fedmerge_peft.data.json_rows import kind
from fedmerge_peft.errors import DataError
from fedmerge_peft.util.text import is_encodable

LARGEST_EXACT = 2**53
"""Integers beyond this limit are not always exact as float64."""


def type_texts(texts: Any) -> Any:
    """Convert a ``pyarrow.ChunkedArray`` of text to booleans or numbers if that loses nothing.

    Converting each result back to text must reproduce the original. Codes such as 007, 1.10 or +1,
    dates, and integers beyond 64 bits therefore stay text.
    """
    if texts.null_count == len(texts):
        return texts
    for target in (pa.bool_(), pa.int64(), pa.float64()):
        try:
            values = texts.cast(target)
        except pa.ArrowInvalid:
            continue
        finite = target != pa.float64() or pc.all(pc.is_finite(values), min_count=0).as_py()
        if finite and as_text(values).equals(texts):
            return values
    return texts


def json_column(
    values: Sequence[Any], name: str, place: Callable[[int], str], key: str = ""
) -> Any:
    """Convert the JSON values of a column to an Arrow array of one type.

    If the values are lists or objects that Arrow cannot represent, such as lists of different
    types, all values of the column become JSON text. A column without any value has the type text.

    Args:
        values: Values of all rows; None is a missing value.
        name: Name of the column, for error messages.
        place: Function that returns the place of a row, such as ``rows.jsonl:7``, for error
            messages. Its argument is the number of the row, from 0.
        key: Beginning of error messages, such as ``data.path: ``.

    Raises:
        DataError: Values have different types; a number is too large to be exact; or a text has
            an unpaired surrogate.
    """
    known = next((row for row, value in enumerate(values) if value is not None), None)
    if known is None:
        return pa.nulls(len(values), pa.string())
    expected = kind(values[known])
    for row, value in enumerate(values):
        if value is not None and kind(value) != expected:
            raise DataError(
                f"{key}{place(row)}: the column {name!r} is {kind(value)} "
                f"({_shown(value)}), but {expected} ({_shown(values[known])}) in {place(known)}; "
                "write one type in all rows"
            )
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError, UnicodeError) as error:
        if expected == "a number":
            row = max(range(len(values)), key=lambda row: abs(values[row] or 0))
            fault = (
                f"has {_shown(values[row])}, which is too large for an exact number; correct the "
                "value, or write the column as text"
            )
        elif expected == "text":
            row = next(row for row, text in enumerate(values) if text and not is_encodable(text))
            fault = "has half of a character (an unpaired surrogate); correct the value"
        else:
            texts = [None if value is None else json.dumps(value) for value in values]
            return pa.array(texts, pa.string())
        raise DataError(f"{key}{place(row)}: the column {name!r} {fault}") from error


def plain_column(column: Any, name: str, place: Callable[[int], str], key: str = "") -> Any:
    """Convert a ``pyarrow.ChunkedArray`` of an uncommon type to a type that the package supports.

    String, binary and list views, and dictionary-encoded and run-end-encoded columns become columns
    of plain values. Float16, which Arrow cannot sort, becomes float32. Values of Arrow's JSON type
    are parsed. UUIDs and pandas periods become text. Other extension types become their storage
    type.

    Raises:
        DataError: ``json_column`` rejects the values of a JSON column, such as values of different
            types.
    """
    if isinstance(column.type, pa.JsonType):
        texts = column.cast(column.type.storage_type).to_pylist()
        values = [None if text is None else json.loads(text) for text in texts]
        return pa.chunked_array([json_column(values, name, place, key)])
    if getattr(column.type, "extension_name", "") == "pandas.period":  # stored as numbers
        return pa.chunked_array([pa.array(column.to_pandas().astype(str), pa.string())])
    if pa.types.is_float16(column.type):
        return column.cast(pa.float32())
    if column.type == pa.uuid():
        texts = [None if value is None else str(value) for value in column.to_pylist()]
        return pa.chunked_array([pa.array(texts, pa.string())])
    if pa.types.is_run_end_encoded(column.type):
        decoded = [pc.run_end_decode(chunk) for chunk in column.chunks]
        return plain_column(pa.chunked_array(decoded, column.type.value_type), name, place, key)
    plain = _plain_type(column.type)
    if plain == column.type:
        return column
    if pa.types.is_nested(plain):  # Arrow's casts of list views are invalid
        return pa.chunked_array([pa.array(column.to_pylist(), plain)])
    return column.cast(plain)


def as_text(values: Any) -> Any:
    """Convert a ``pyarrow.ChunkedArray`` of booleans or numbers to text: ``true``, ``1.5``."""
    if not pa.types.is_floating(values.type):
        return values.cast(pa.string())
    texts = [None if value is None else repr(value) for value in values.to_pylist()]
    return pa.chunked_array([pa.array(texts, pa.string())])


def whole_numbers(columns: Sequence[Any]) -> list[Any]:
    """Convert floating-point columns to int64 if all of their values are whole and exact.

    Pandas stores integers as floats, such as 1.0, if some values are missing. In converted columns,
    NaN becomes null.

    Args:
        columns: The ``pyarrow.ChunkedArray`` of each split. Either all or none are converted.
    """
    if not all(pa.types.is_floating(column.type) for column in columns):
        return list(columns)
    exact = [column.cast(pa.float64()) for column in columns]
    known = [
        pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column) for column in exact
    ]
    try:
        converted = [column.cast(pa.int64()) for column in known]
    except pa.ArrowInvalid:  # a value is a fraction or infinite
        return list(columns)
    small = (pc.all(pc.less(pc.abs(column), LARGEST_EXACT), min_count=0) for column in converted)
    return converted if all(check.as_py() for check in small) else list(columns)


def _plain_type(type: Any) -> Any:
    if isinstance(type, pa.BaseExtensionType):
        return _plain_type(type.storage_type)
    if pa.types.is_dictionary(type):
        return _plain_type(type.value_type)
    if pa.types.is_string_view(type):
        return pa.string()
    if pa.types.is_binary_view(type):
        return pa.binary()
    if pa.types.is_list_view(type) or pa.types.is_list(type):
        return pa.list_(type.value_field.with_type(_plain_type(type.value_type)))
    if pa.types.is_large_list_view(type) or pa.types.is_large_list(type):
        return pa.large_list(type.value_field.with_type(_plain_type(type.value_type)))
    if pa.types.is_struct(type):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in type])
    return type


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:36]} ..."
