"""Work of a run: the number of its optimizer steps, checked before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from statistics import fmean

from fedmerge_peft.errors import RecipeError
from fedmerge_peft.federation.cohorts import cohort_size
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.training.hyperparameters import Hyperparameters
from fedmerge_peft.training.optimization import count_steps

log = logging.getLogger(__name__)

MANY_STEPS = 1e7
"""Optimizer steps of a run that take hours even for a tiny model, at a millisecond each."""
MAX_STEPS = 1e10
"""Optimizer steps of a run that take months even for a tiny model."""


def check_work(recipe: Recipe, sizes: Sequence[int], chosen: Hyperparameters) -> None:
    """Warn about a run of more than ``MANY_STEPS`` optimizer steps; refuse more than ``MAX_STEPS``.

    A run has R rounds of k clients. Client i trains at most p times in a round
    (``passes_per_round``), and each time takes s_i steps on its n_i examples. The estimate is
    R · k · p · mean(s_i) steps. Extra steps of a strategy, such as warm-up steps, are not counted.

    Args:
        recipe: Recipe of the run.
        sizes: n_i, training examples of each client.
        chosen: Values of keys that are ``auto``.

    Raises:
        RecipeError: The estimate is above ``MAX_STEPS``.
    """
    training = chosen.apply_to(recipe.training)
    clients = cohort_size(recipe, len(sizes))
    steps = fmean(count_steps(size, training) for size in sizes) if sizes else 0.0
    steps *= recipe.strategy.passes_per_round
    total = recipe.rounds * clients * steps
    if total <= MANY_STEPS:
        return
    key = "training.epochs" if training.steps is None else "training.steps"
    work = (
        f"the run takes about {total:,.0f} optimizer steps (rounds: {recipe.rounds:,} × clients "
        f"per round: {clients:,.10g} × steps per client: {steps:,.0f})"
    )
    remedy = f"lower rounds, clients.fraction or {key}"
    if total > MAX_STEPS:
        raise RecipeError(f"rounds: {work}, and at most {MAX_STEPS:,.0f} are accepted; {remedy}")
    log.warning("%s; to take fewer, %s", work, remedy)
