"""Grids: one recipe for each combination of the values in ``key=a,b,c``.

This module does not import torch.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from itertools import product
from math import prod

import yaml

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.recipe.python_values import OVERRIDES, listed_overrides
from fedmerge_peft.recipe.schema import Recipe
from fedmerge_peft.util.text import printable

MOST = 1_000
"""Maximum number of combinations in one grid."""

_LONGEST = 120
"""Maximum length of a name in characters. Longer names are cut, and end in a digest."""

_OPEN = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
_CLOSE = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)


def expand(source: str | os.PathLike[str], overrides: Iterable[str] = ()) -> dict[str, Recipe]:
    """Return one recipe for each combination of values, and for each of its baselines.

    The names contain the keys that vary. ``expand("quickstart", ["strategy.adapters=3,6",
    "seed=0,1"])`` returns ``strategy.adapters=3,seed=0`` and three more combinations. The last key
    varies fastest. Commas in brackets, braces and quotes do not separate values.

    Each baseline becomes a separate recipe, such as ``strategy=fedavg,seed=0``. A baseline is
    included once for each combination of the keys outside ``strategy`` and ``baselines``, even if
    several variants of the strategy are compared with it. It is left out if a combination is the
    same recipe. If there are baselines and only such outside keys vary, the names of the
    combinations also begin with their strategy: ``strategy=fedmerge,seed=0``.

    Args:
        source: A shipped recipe's name, or the path of a YAML file.
        overrides: ``key.sub=value,value,...``, each key once.

    Returns:
        Recipes without baselines, by name. Names are valid folder names. If nothing varies and
        there are no baselines, the name is that of the recipe.

    Raises:
        RecipeError: An override is not of this form, a key or a value is given twice, there are
            more than ``MOST`` combinations, two combinations are the same recipe, or a recipe is
            invalid. The error lists each fault once.
    """
    keys, choices = _parsed(overrides)
    varied = [key for key, values in zip(keys, choices, strict=True) if len(values) > 1]
    combinations: list[tuple[str, Recipe]] = []
    baselines: list[tuple[str, Recipe]] = []
    faults: dict[str, None] = {}
    for values in product(*choices):
        settings = dict(zip(keys, values, strict=True))
        try:
            recipe = Recipe.load(source, [f"{key}={value}" for key, value in settings.items()])
        except RecipeError as error:
            faults |= dict.fromkeys(error.faults)
            continue
        alone = recipe.model_copy(update={"baselines": []})
        own = {key: settings[key] for key in varied}
        rest = {
            key: value
            for key, value in own.items()
            if key.partition(".")[0] not in ("strategy", "baselines")
        }
        if recipe.baselines and rest == own:
            own = {"strategy": recipe.strategy.name, **own}
        combinations.append((_name(own, recipe), alone))
        for baseline in recipe.baselines:
            baselines.append(
                (
                    _name({"strategy": baseline.name, **rest}, recipe),
                    alone.model_copy(update={"strategy": baseline}),
                )
            )
    if faults:
        raise RecipeError(*faults)
    return _distinct(combinations, baselines)


def _distinct(
    combinations: list[tuple[str, Recipe]], baselines: list[tuple[str, Recipe]]
) -> dict[str, Recipe]:
    """Return the recipes by unique names, without repeated baselines.

    If a name is taken (both ``a/b`` and ``a:b`` become ``a-b``; case does not count), a digest is
    appended to it. Raises ``RecipeError`` if two combinations are the same recipe.
    """
    recipes: dict[str, Recipe] = {}
    taken: set[str] = set()
    known: dict[str, str] = {}
    for number, (name, recipe) in enumerate(combinations + baselines):
        content = recipe.model_dump_json(exclude={"name"})
        if other := known.get(content):
            if number < len(combinations):
                raise RecipeError(
                    printable(
                        f"{OVERRIDES}: {other} and {name} give the same recipe; remove one of them"
                    )
                )
            continue
        name = _with_digest(name, content) if name.casefold() in taken else name
        taken.add(name.casefold())
        known[content], recipes[name] = name, recipe
    return recipes


def _parsed(overrides: Iterable[str]) -> tuple[list[str], list[list[str]]]:
    """Return the keys, and the values of each key as text. Raises ``RecipeError``."""
    settings: dict[str, list[str]] = {}
    faults = []
    for text in listed_overrides(overrides):
        key, equals, values = text.partition("=")
        key = key.strip()
        if key in settings:
            faults.append(
                f"{OVERRIDES}: {key}: given twice; write all of its values as one {key}=a,b,c"
            )
            continue
        settings[key] = [value.strip() for value in _split(values)]
        if not equals or not key:
            faults.append(
                f"{OVERRIDES}: found {text!r}, expected key=value,value,..., such as seed=0,1,2"
            )
        elif not all(settings[key]):
            faults.append(
                f"{OVERRIDES}: {key}: empty value in {text!r}; write key=a,b,c, with null for "
                "no value"
            )
        elif repeated := [
            value for value in dict.fromkeys(settings[key]) if settings[key].count(value) > 1
        ]:
            faults.append(
                f"{OVERRIDES}: {key}: duplicate value {', '.join(repeated)}; write each value once"
            )
    if (combinations := prod(map(len, settings.values()))) > MOST:
        faults.append(
            f"{OVERRIDES}: {combinations:,} combinations exceed the limit of {MOST:,}; "
            "give fewer values"
        )
    if faults:
        raise RecipeError(*map(printable, faults))
    return list(settings), list(settings.values())


def _split(text: str) -> Iterator[str]:
    """Yield the items of a YAML list that is written without brackets, as text."""
    depth, begin = 0, 0
    try:
        for token in yaml.scan(f"[{text}]"):
            depth += isinstance(token, _OPEN) - isinstance(token, _CLOSE)
            if depth == 1 and isinstance(token, yaml.FlowEntryToken):
                yield text[begin : token.start_mark.index - 1]
                begin = token.start_mark.index
    except yaml.YAMLError:  # reported when the recipe is read
        pass
    yield text[begin:]


def _name(settings: dict[str, str], recipe: Recipe) -> str:
    """Return settings as a folder name, ``key=value,...``; without settings, the recipe's name."""
    name = ",".join(f"{_plain(key)}={_plain(value)}" for key, value in settings.items()) or _plain(
        recipe.name
    )
    return name if name and len(name) <= _LONGEST else _with_digest(name, str(settings))


def _plain(text: str) -> str:
    return re.sub(r"[^\w.+=-]+", "-", text, flags=re.ASCII).strip("-.")


def _with_digest(name: str, text: str) -> str:
    digest = blake2b(text.encode("utf-8", "replace"), digest_size=4).hexdigest()
    return f"{name[: _LONGEST - 9]}-{digest}"
