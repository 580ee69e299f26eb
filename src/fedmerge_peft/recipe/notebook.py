"""HTML of a recipe for notebooks."""

from __future__ import annotations

from typing import Any

from fedmerge_peft.util.html import details, facts, lines, page


def recipe_html(recipe: Any) -> str:  # a Recipe, whose module imports this one
    """Return HTML with the main settings of a recipe, followed by all settings as YAML."""
    training = recipe.training
    length = f"{training.steps} steps" if training.steps else f"epochs {training.epochs}"
    baselines = ", ".join(baseline.name for baseline in recipe.baselines)
    return page(
        recipe.name,
        facts(
            [
                ("task", f"{recipe.task.name} ({', '.join(recipe.task.metrics)})"),
                ("model", recipe.backbone.model),
                ("data", recipe.data.path),
                ("clients", recipe.data.partition.summary()),
                ("strategy", recipe.strategy.name),
                ("baselines", baselines or "none"),
                ("rounds", f"{recipe.rounds}, seed {recipe.seed}"),
                ("training", f"learning rate {training.learning_rate}, {length}"),
            ]
        ),
        details("All settings", lines(recipe.to_yaml())),
    )
