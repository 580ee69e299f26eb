"""Presets: values of several sections at once, for the keys that a recipe does not set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedmerge_peft.recipe.section import Section

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "": {"rounds": 500},
        "strategy": {
            "name": "fedmerge",
            "adapters": 5,
            "rule": "paper",
            "weights_lr": 0.01,
            "start": "independent",
            "own_head": False,
        },
        "training": {
            "optimizer": "sgd",
            "learning_rate": 0.01,
            "momentum": 0.0,
            "weight_decay": 0.0,
            "batch_size": 32,
            "epochs": 2,
            "schedule": "constant",
            "max_grad_norm": None,
            "proximal": 0.01,
        },
        "evaluation": {"every": 1, "serve": "best"},
    }
}
"""Values by preset and section of the recipe; ``""`` is the top level.

``paper`` has the settings of the program that the authors of FedMerge published for CIFAR-100
(arXiv 2504.06768): the rule and the start of the paper; local SGD on the loss
+ 0.01 · ‖θ − θ_sent‖²; and the result of the round with the lowest mean validation loss.
"""


def with_preset(recipe: Any) -> Any:
    """Return the recipe's values; keys that it lacks get the values of ``strategy.preset``.

    Args:
        recipe: Values of a recipe by key, before validation. Sections may be dictionaries or
            validated sections.

    Returns:
        New values, or ``recipe`` itself if it does not name a preset of its strategy. If it names
        another preset, the validation refuses it later.
    """
    sections = recipe if isinstance(recipe, Mapping) else {}
    strategy = _written(sections.get("strategy"))
    preset = PRESETS.get(str(strategy.get("preset")))
    if preset is None or strategy.get("name") != preset["strategy"]["name"]:
        return recipe
    filled = dict(sections)
    for name, values in preset.items():
        if not name:
            filled = {**values, **filled}
        elif name not in filled or isinstance(filled[name], Mapping | Section):
            filled[name] = {**values, **_written(filled.get(name))}
    return filled


def resolved(recipe: Any) -> dict[str, Any]:
    """Return the recipe's values of all keys in its preset, by dotted key.

    The name of the strategy is left out. The result is empty without a preset.
    """
    preset = PRESETS.get(recipe.strategy.chosen_preset or "", {})
    return {
        f"{section}.{key}".lstrip("."): getattr(
            getattr(recipe, section) if section else recipe, key
        )
        for section, values in preset.items()
        for key in values
        if key != "name"
    }


def _written(section: Any) -> dict[str, Any]:
    """Return the name of a section and the values of the keys that it sets; {} for other values."""
    if isinstance(section, Section):
        kind = {key: getattr(section, key) for key in ("name",) if hasattr(section, key)}
        return {**section.model_dump(exclude_unset=True), **kind}
    return dict(section) if isinstance(section, Mapping) else {}
