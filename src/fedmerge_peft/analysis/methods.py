"""Which runs are the same method, and in the same setting; and short names for both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat, written

if TYPE_CHECKING:
    import pandas

_SETTING = {"task": True, "backbone": True, "data": True}
_SPEED = ("training.device", "training.prefix_cache", "training.clients_per_batch")
_NO_METHOD = ("name", "seed", "baselines", "task.metrics", "evaluation", "tracking", *_SPEED)
"""Chance, what is measured and reported, and where or how fast something is computed: none of it changes what is done."""


def methods(recipes: Sequence[Recipe]) -> pandas.DataFrame:
    """Sort recipes into settings and methods.

    Recipes with one task, backbone and data are one setting, whatever metrics they report. In it, those that are equal apart from
    seed, name, baselines, evaluation, device and what saves time are one method. A method is called by its strategy and by those of its
    values that other methods have otherwise, such as ``fedmerge adapters=3``; a setting by its recipes' name, or by the values that other
    settings have otherwise.

    Returns:
        One row a recipe: the names ``setting``, ``method`` and ``strategy``, the ``seed``, and ``rest``, which is equal for methods
        that differ in nothing but their strategy.
    """
    import pandas

    settings = [
        recipe.model_dump_json(include=_SETTING, exclude={"task": {"metrics"}})
        for recipe in recipes
    ]
    kinds = [_same(_values(recipe)) for recipe in recipes]
    together: dict[str, dict[str, Recipe]] = {}
    for setting, kind, recipe in zip(settings, kinds, recipes, strict=True):
        together.setdefault(setting, {}).setdefault(kind, recipe)
    method_names = {
        kind: name for same in together.values() for kind, name in _method_names(same).items()
    }
    setting_names = _setting_names(
        {
            setting: [r for r, s in zip(recipes, settings, strict=True) if s == setting]
            for setting in together
        }
    )
    return pandas.DataFrame(
        {
            "setting": [setting_names[setting] for setting in settings],
            "method": [method_names[kind] for kind in kinds],
            "strategy": [recipe.strategy.name for recipe in recipes],
            "seed": [recipe.seed for recipe in recipes],
            "rest": [
                _same(
                    {
                        key: value
                        for key, value in _values(recipe).items()
                        if not key.startswith("strategy.")
                    }
                )
                for recipe in recipes
            ],
        }
    )


def _method_names(recipes: Mapping[str, Recipe]) -> dict[str, str]:
    """A name for each method of one setting, from one recipe of each."""
    values = {method: _values(recipe) for method, recipe in recipes.items()}
    common = [key for key in differing(list(values.values())) if not key.startswith("strategy.")]
    names = {}
    for method, recipe in recipes.items():
        family = [
            values[other]
            for other, each in recipes.items()
            if each.strategy.name == recipe.strategy.name
        ]
        own = [key for key in differing(family) if key.startswith("strategy.")]
        names[method] = " ".join([recipe.strategy.name, *_said(values[method], own + common)])
    return names


def _setting_names(recipes: Mapping[str, Sequence[Recipe]]) -> dict[str, str]:
    """A name for each setting, from its recipes."""
    given = {setting: {recipe.name for recipe in same} for setting, same in recipes.items()}
    if len(set().union(*given.values())) == sum(map(len, given.values())) == len(given):
        return {setting: name for setting, (name,) in given.items()}
    values = {setting: _values(same[0]) for setting, same in recipes.items()}
    keys = [
        key for key in differing(list(values.values())) if key.partition(".")[0] in _SETTING
    ] or ["data.path"]
    return {setting: " ".join(_said(each, keys)) for setting, each in values.items()}


def _values(recipe: Recipe) -> dict[str, Any]:
    """What makes a method what it is."""
    return {
        key: value
        for key, value in flat(recipe).items()
        if not f"{key}.".startswith(tuple(f"{each}." for each in _NO_METHOD))
    }


def _same(values: Mapping[str, Any]) -> str:
    """A text that is equal for equal values."""
    return json.dumps(values, default=str)


def _said(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """``key=value`` for the keys that are there, each as short as it can be told from the others."""
    last = [key.rpartition(".")[2] for key in keys]
    short = {
        key: end if last.count(end) == 1 and end != "name" else key
        for key, end in zip(keys, last, strict=True)
    }
    return [f"{short[key]}={written(values[key])}" for key in keys if key in values]
