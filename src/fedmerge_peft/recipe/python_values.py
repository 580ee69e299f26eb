"""Check arguments that Python passes, and nest values with dotted keys."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.error_messages import found
from fedmerge_peft.recipe.section import Section
from fedmerge_peft.recipe.yaml_document import Fault, Mark, Where, refuse

OVERRIDES = Mark("overrides")
"""Origin of values in overrides, which the command line or a Python program passes."""


def check_recipe(value: object, argument: str = "recipe") -> None:
    """Raise ``RecipeError`` if an argument is not a recipe but, for example, a recipe's name."""
    if not isinstance(value, Section):
        loading = f"Recipe.load({value!r})" if isinstance(value, str) else "Recipe.load(...)"
        raise RecipeError(
            f"{argument}: found {found(value)}, expected a Recipe; {loading} reads a file or a "
            "shipped recipe, Recipe({...}) takes a dictionary"
        )


def check_recipes(value: object) -> None:
    """Raise ``RecipeError`` if an argument is not a dictionary of recipes by name."""
    if not isinstance(value, Mapping):
        raise RecipeError(
            f"recipes: found {found(value)}, expected a dictionary of recipes by name, as "
            "fedmerge_peft.expand returns"
        )
    for name, recipe in value.items():
        check_recipe(recipe, f"recipes[{name!r}]")


def check_source(value: object) -> None:
    """Raise ``RecipeError`` if an argument is neither a path nor a name."""
    if not isinstance(value, str | os.PathLike):
        raise RecipeError(
            f"source: found {found(value)}, expected a path or the name of a shipped recipe; "
            "Recipe({...}) takes a dictionary"
        )


def listed_overrides(values: object) -> list[str]:
    """Return overrides as a list.

    Raises ``RecipeError`` for anything but an iterable of texts. A single text and a mapping are
    errors, too.
    """
    if isinstance(values, Iterable) and not isinstance(values, str | Mapping):
        listed = list(values)
        if all(isinstance(text, str) for text in listed):
            return listed
    raise RecipeError(
        f"{OVERRIDES}: found {found(values)}, expected a list of texts, such as "
        '["training.epochs=2"]'
    )


def nested(values: Mapping[Any, Any], source: str) -> dict[Any, Any]:
    """Convert dotted keys to nested dictionaries.

    ``{"training.epochs": 2}`` becomes ``{"training": {"epochs": 2}}``. Only outermost keys are
    split, because keys within sections may be names with dots, such as columns of ``data.filter``.
    The arguments are not changed.

    Args:
        values: Values by key.
        source: Place of the values, for error messages.

    Raises:
        RecipeError: A key is not text or is given twice, or its section is not a dictionary.
    """
    result = {key: value for key, value in values.items() if not _is_dotted(key)}
    faults = [
        Fault(Mark(source), (), f"found the key {found(key)}, expected text")
        for key in result
        if not isinstance(key, str)
    ]
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
    """Return the section at a path, and the fault or an empty text.

    All sections on the path are replaced by copies in ``values``, so that the caller may change
    them. Missing ones are created.
    """
    for step in path:
        inner = values.get(step, {})
        if not isinstance(inner, Mapping):
            return {}, f"{step} is {found(inner)} here; write it as a dictionary with all its keys"
        values[step] = values = dict(inner)
    return values, ""


def _is_dotted(key: Any) -> bool:
    return isinstance(key, str) and "." in key
