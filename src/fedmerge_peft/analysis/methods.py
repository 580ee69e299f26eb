"""Group runs into settings and methods, with short names for both."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedmerge_peft.recipe import Recipe
from fedmerge_peft.recipe.diff import differing, flat, written

if TYPE_CHECKING:
    import pandas

_SETTING = {"task": True, "backbone": True, "data": True}
_SPEED = (
    "training.device",
    "training.prefix_cache",
    "training.prefix_disk",
    "training.packing",
    "training.clients_per_batch",
)
_IRRELEVANT = (
    "name",
    "seed",
    "baselines",
    "task.metrics",
    "evaluation",
    "tracking",
    "callbacks",
    "plugins",
    *_SPEED,
)
"""Keys that do not define a method: names, seed, evaluation, reporting, plugins, device, speed."""


def methods(recipes: Sequence[Recipe]) -> pandas.DataFrame:
    """Group recipes into settings and methods.

    A setting is one task, backbone and data set, regardless of metrics. Within it, recipes that
    differ only in seed, name, baselines, evaluation, reporting, plugins, device and speed options
    are one method. A method is named by its strategy and the values that distinguish it from other
    methods, such as ``fedmerge adapters=3``. A setting is named by its recipes' name, or by the
    values that distinguish it from other settings.

    Returns:
        One row per recipe: the names ``setting``, ``method`` and ``strategy``, the ``seed``, and
        ``rest``, which is equal for methods that differ only in their strategy.
    """
    import pandas

    settings = [
        recipe.model_dump_json(include=_SETTING, exclude={"task": {"metrics"}})
        for recipe in recipes
    ]
    method_keys = [_key(_values(recipe)) for recipe in recipes]
    by_setting: dict[str, dict[str, Recipe]] = {}
    for setting, key, recipe in zip(settings, method_keys, recipes, strict=True):
        by_setting.setdefault(setting, {}).setdefault(key, recipe)
    method_names = {
        key: name for group in by_setting.values() for key, name in _method_names(group).items()
    }
    setting_names = _setting_names(
        {
            setting: [
                recipe for recipe, other in zip(recipes, settings, strict=True) if other == setting
            ]
            for setting in by_setting
        }
    )
    return pandas.DataFrame(
        {
            "setting": [setting_names[setting] for setting in settings],
            "method": [method_names[key] for key in method_keys],
            "strategy": [recipe.strategy.name for recipe in recipes],
            "seed": [recipe.seed for recipe in recipes],
            "rest": [
                _key(
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
    """Name each method of one setting.

    Args:
        recipes: One recipe of each method, by the method's key.

    Returns:
        Names by the methods' keys.
    """
    values = {method: _values(recipe) for method, recipe in recipes.items()}
    common = [key for key in differing(list(values.values())) if not key.startswith("strategy.")]
    names = {}
    for method, recipe in recipes.items():
        family = [
            values[other]
            for other, candidate in recipes.items()
            if candidate.strategy.name == recipe.strategy.name
        ]
        own = [key for key in differing(family) if key.startswith("strategy.")]
        names[method] = " ".join(
            [recipe.strategy.name, *_assignments(values[method], own + common)]
        )
    return names


def _setting_names(recipes: Mapping[str, Sequence[Recipe]]) -> dict[str, str]:
    """Name each setting by the name of its recipes, or by the values that distinguish it.

    Recipe names are used if each setting has a single one and no two settings have the same.

    Args:
        recipes: Recipes of each setting, by the setting's key.

    Returns:
        Names by the settings' keys.
    """
    names = {setting: {recipe.name for recipe in group} for setting, group in recipes.items()}
    if len(set().union(*names.values())) == sum(map(len, names.values())) == len(names):
        return {setting: name for setting, (name,) in names.items()}
    values = {setting: _values(group[0]) for setting, group in recipes.items()}
    keys = [
        key for key in differing(list(values.values())) if key.partition(".")[0] in _SETTING
    ] or ["data.path"]
    return {setting: " ".join(_assignments(own, keys)) for setting, own in values.items()}


def _values(recipe: Recipe) -> dict[str, Any]:
    """Return the values that define a method, by dotted key."""
    prefixes = tuple(f"{key}." for key in _IRRELEVANT)
    return {key: value for key, value in flat(recipe).items() if not f"{key}.".startswith(prefixes)}


def _key(values: Mapping[str, Any]) -> str:
    """Return a text that identifies the values: equal texts mean equal values."""
    return json.dumps(values, default=str)


def _assignments(values: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    """Return ``key=value`` for each of the keys that ``values`` has.

    A key is shortened to its last part, unless this part is ``name`` or also ends another key.
    """
    last = [key.rpartition(".")[2] for key in keys]
    short = {
        key: end if last.count(end) == 1 and end != "name" else key
        for key, end in zip(keys, last, strict=True)
    }
    return [f"{short[key]}={written(values[key])}" for key in keys if key in values]
