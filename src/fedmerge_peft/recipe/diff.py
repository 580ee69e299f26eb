"""Differences between recipes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedmerge_peft.recipe.schema import Recipe

_ABSENT = object()


def flat(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by dotted key, in the order of the schema.

    The result has the form ``{"name": ..., "strategy.adapters": 5, ...}``. Lists, such as
    ``baselines``, stay one value. Defaults of strategies that depend on other keys, such as that of
    ``server_lr``, are replaced by the values that take effect.
    """
    values = recipe.model_dump()
    for strategy, section in zip(
        [recipe.strategy, *recipe.baselines],
        [values["strategy"], *values["baselines"]],
        strict=True,
    ):
        section |= strategy.effective_values()
    return _flat(values, "")


def _flat(section: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for key, value in section.items():
        values |= (
            _flat(value, f"{prefix}{key}.")
            if isinstance(value, dict) and value
            else {f"{prefix}{key}": value}
        )
    return values


def differing(recipes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the keys whose values differ between flat recipes, in the order of their occurrence.

    A key that only some of the recipes have is among them.
    """
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    return [
        key
        for key in keys
        if any(recipe.get(key, _ABSENT) != recipes[0].get(key, _ABSENT) for recipe in recipes[1:])
    ]


def written(value: object) -> str:
    """Format a value for labels and messages.

    Text is unchanged. Other values become JSON without spaces after separators, and without
    quotation marks.
    """
    return (
        value
        if isinstance(value, str)
        else json.dumps(value, separators=(",", ":"), ensure_ascii=False, default=str).replace(
            '"', ""
        )
    )
