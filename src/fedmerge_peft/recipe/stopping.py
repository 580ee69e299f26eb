"""Section of early stopping."""

from __future__ import annotations

from fedmerge_peft.recipe.section import Count, Section


class StopRecipe(Section):
    """End of a run, or of a baseline, before its last round."""

    patience: Count | None = None
    """Stop if the mean validation score of the served models has not improved in this number of
    evaluated rounds in a row; null to run all rounds. It needs validation examples, and all clients
    in each round. Scores are those at the start of a round."""
    metric: str = "loss"
    """The score: loss, or a metric of the task."""
