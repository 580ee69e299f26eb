"""Recipes from Python values: dotted keys, as on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmerge_peft.recipe.error_messages import found
from fedmerge_peft.recipe.yaml_document import Fault, Mark, Where, refuse


def nested(values: Mapping[Any, Any], source: str) -> dict[Any, Any]:
    """Return values with ``{"training.epochs": 2}`` as ``{"training": {"epochs": 2}}``.

    Only outermost keys have dots. Those within sections may be names, such as columns of
    ``data.filter``. The arguments do not change.

    Args:
        values: Values by key.
        source: Place of the values, for error messages.

    Raises:
        RecipeError: A key is given twice, or its section is no dictionary.
    """
    result = {key: value for key, value in values.items() if not _is_dotted(key)}
    faults = []
    for key in filter(_is_dotted, values):
        where = tuple(key.split("."))
        part, text = _section(result, where[:-1])
        last = where[-1]
        if last in part:
            text = f"is given twice: {found(part[last])} and {found(values[key])}"
        if text:
            faults.append(Fault(Mark(source), where, text))
        else:
            part[last] = values[key]
    if faults:
        raise refuse(faults)
    return result


def _section(values: dict[Any, Any], path: Where) -> tuple[dict[Any, Any], str]:
    """Return the section at a path, copied down to it, and the fault or an empty text."""
    for step in path:
        inner = values.get(step, {})
        if not isinstance(inner, Mapping):
            return {}, f"{step} is {found(inner)} here; write it as a dictionary with all its keys"
        values[step] = values = dict(inner)
    return values, ""


def _is_dotted(key: Any) -> bool:
    return isinstance(key, str) and "." in key
