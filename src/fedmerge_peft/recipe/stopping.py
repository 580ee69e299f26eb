"""Section of early stopping."""

from __future__ import annotations

from fedmerge_peft.recipe.section import Count, Section


class StopRecipe(Section):
    """Early end of a run, or of a baseline."""

    patience: Count | None = None
    """Stop if the mean validation score of the served models has not improved in this number of
    consecutive evaluated rounds; null to run all rounds. Early stopping requires validation
    examples and `clients.fraction: 1`, and excludes `privacy`. Scores are measured at the start of
    a round."""
    metric: str = "loss"
    """Score to compare: loss, or a metric of the task."""
