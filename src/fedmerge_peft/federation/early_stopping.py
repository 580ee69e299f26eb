"""Early stopping by validation scores. Its state follows from the rounds' records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

from fedmerge_peft.recipe.stopping import StopRecipe
from fedmerge_peft.tasks.metrics import greater_is_better


class EarlyStopping:
    """Decision to end a run when its validation score no longer improves.

    stopping = EarlyStopping(StopRecipe(patience=2))
    for loss in (0.7, 0.5, 0.6, 0.5):
        stopping.observe({"a client": {"validation_loss": loss}})
    assert stopping.reason == "the validation loss has not improved in 2 evaluated rounds"
    """

    def __init__(self, recipe: StopRecipe) -> None:
        self._patience = recipe.patience
        self._metric = recipe.metric
        self._sign = 1.0 if greater_is_better(recipe.metric) else -1.0
        self._best = -math.inf
        self._idle = 0

    def observe(self, scores: Mapping[str, Mapping[str, float]] | None) -> None:
        """Add the scores of one round.

        Args:
            scores: Scores of the served models by client; None for a round without evaluation.
        """
        key = f"validation_{self._metric}"
        values = [
            client_scores[key] for client_scores in (scores or {}).values() if key in client_scores
        ]
        if not values:
            return
        value = self._sign * fmean(values)  # NaN is not an improvement
        self._idle = 0 if value > self._best else self._idle + 1
        self._best = value if value > self._best else self._best

    @property
    def reason(self) -> str | None:
        """Reason to stop now; None if the run should continue."""
        if self._patience is None or self._idle < self._patience:
            return None
        return (
            f"the validation {self._metric} has not improved in {self._patience} evaluated "
            f"round{'s' * (self._patience > 1)}"
        )
