"""JSON without the extensions of Python's module: finite numbers, unique keys, Unicode text."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def dumps(value: Any, *, indent: int | None = None, default: Callable[[Any], Any] = str) -> str:
    """Return JSON. NaN becomes null, and infinity the text "Infinity" or "-Infinity".

    Args:
        value: Value.
        indent: Spaces per level. None writes a single line.
        default: Function that converts a value of a type that JSON lacks.
    """
    try:
        return json.dumps(
            value, indent=indent, ensure_ascii=False, allow_nan=False, default=default
        )
    except ValueError:  # a number is not finite
        return json.dumps(
            _finite(value, default), indent=indent, ensure_ascii=False, allow_nan=False
        )


def loads(text: str | bytes) -> Any:
    """Parse JSON.

    Raises:
        ValueError: The text is invalid, is nested too deeply, repeats a key, or contains a number
            that is not finite or text that is not valid Unicode.
    """
    try:
        value = json.loads(
            text,
            parse_constant=_refuse_constant,
            parse_float=_finite_float,
            object_pairs_hook=_unique,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    escape: Any = b"\\ud" if isinstance(text, bytes) else "\\ud"
    if escape in text.lower():
        dumps(value).encode()  # an unpaired surrogate raises UnicodeEncodeError
    return value


def _finite(value: Any, default: Callable[[Any], Any]) -> Any:
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        return None if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
    if isinstance(value, str | int | None):
        return value
    if isinstance(value, Mapping):
        return {key: _finite(inner, default) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner, default) for inner in value]
    return _finite(default(value), default)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _finite_float(text: str) -> float:
    if math.isfinite(value := float(text)):
        return value
    raise ValueError("a number is too large")


def _unique(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key is given twice")
    return values
