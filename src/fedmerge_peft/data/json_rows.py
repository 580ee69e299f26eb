"""Read JSON files with one object per row, in a list or one after another."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedmerge_peft.errors import DataError

logger = logging.getLogger(__name__)

_SPACE = re.compile(r"[ \t\r\n]*")


class JsonRow(NamedTuple):
    """Object of one row, and its place in a file for error messages, such as ``rows.jsonl:7``."""

    place: str
    values: dict[str, Any]


def read_json(path: Path, text: str) -> list[JsonRow]:
    """Read the rows of a file: a list of objects, or objects one after another.

    Raises:
        DataError: The text is not JSON in one of these forms, or an object repeats a key. The
            message names the line or the row, unless the file is one object of columns.
    """
    values, places = _values(path, text)
    alone = len(values) == 1 and path.suffix.lower() == ".json"
    if len(values) == 1 and isinstance(values[0], list):
        alone, (values,) = False, values
        places = [f"{path}, row {number}" for number in range(1, len(values) + 1)]
    if len(values) == 1 and _has_columns(values[0]):
        raise DataError(
            f"data.path: {path} has one object of columns, not an object for each row; write one "
            "object per row (in pandas: to_json(path, orient='records'))"
        )
    for value, place in zip(values, places, strict=True):
        if not isinstance(value, dict):
            raise DataError(
                f"data.path: {place}: a row is {kind(value)}, not an object; write a list of "
                "objects, or one object per line"
            )
    if alone:
        logger.warning(
            "%s has one object, which is read as one row; for several rows, write a list of "
            "objects, or one object per line",
            path,
        )
    return [JsonRow(place, value) for value, place in zip(values, places, strict=True)]


def _has_columns(value: object) -> bool:
    """Return True for an object of columns, as pandas writes it: ``{"text": {"0": ...}}``."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(
            isinstance(column, dict) and column and all(row.isdecimal() for row in column)
            for column in value.values()
        )
    )


def kind(value: object) -> str:
    """Return the JSON type of a value as messages name it, such as ``a list`` or ``text``."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")


def _values(path: Path, text: str) -> tuple[list[Any], list[str]]:
    """Return the JSON values of a file, and their places as ``file:line``."""
    decoder = json.JSONDecoder(object_pairs_hook=_distinct, parse_constant=_constant)
    values, places, position, line, counted = [], [], 0, 1, 0
    while (position := _end_of_space(text, position)) < len(text):
        line, counted = line + text.count("\n", counted, position), position
        try:
            value, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise DataError(
                f"data.path: {path}:{error.lineno}: invalid JSON: {error.msg} "
                f"(character {error.colno})"
            ) from error
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise DataError(
                f"data.path: {path}:{line}: invalid JSON in the value that begins here: {reason}"
            ) from error
        values.append(value)
        places.append(f"{path}:{line}")
    return values, places


def _end_of_space(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    return match.end() if match else position


def _distinct(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has two values for {repeated!r}")
    return content


def _constant(name: str) -> float | None:
    """Convert the constants that Python adds to JSON: NaN to None, infinities to floats."""
    return None if name == "NaN" else float(name)
