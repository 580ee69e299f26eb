"""Privacy loss ε of the clients so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from fedmerge_peft.recipe.privacy import PrivacyRecipe
from fedmerge_peft.strategies.differential_privacy import epsilon_spent


class PrivacyLedger:
    """Count of the rounds in which each client was selected; failed replies count too.

    Args:
        recipe: Noise and δ.
        cohort: ``cohort(round)`` returns the clients selected for a round.
    """

    def __init__(self, recipe: PrivacyRecipe, cohort: Callable[[int], Sequence[int]]) -> None:
        self._recipe = recipe
        self._cohort = cohort
        self._selected = Counter[int]()
        self._rounds = 0

    def epsilon(self, rounds: int) -> float:
        """Return ε of the client that was selected most often in the first ``rounds`` rounds.

        Raises:
            RecipeError: The accountant is not installed.
        """
        if rounds < self._rounds:
            self._selected.clear()
            self._rounds = 0
        while self._rounds < rounds:
            self._rounds += 1
            self._selected.update(self._cohort(self._rounds))
        return epsilon_spent(self._recipe, max(self._selected.values(), default=0))
