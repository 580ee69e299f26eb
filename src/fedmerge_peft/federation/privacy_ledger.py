"""Privacy loss ε of the clients in a run: every release of every method counts.

A release is a round in which a client was selected. If the sample of clients is secret, each round
is a release of all clients (``_cohort``). A release is charged before the round starts, so that
failed rounds count too. The methods of a run (its strategy and its baselines) train on the same
examples, so their releases add up. Across sites, a round that is repeated after an interruption
draws new noise and counts again. A simulation repeats the noise of its seed: the repetition is the
same release, and counts once.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft import distributed
from fedmerge_peft.errors import RunError
from fedmerge_peft.federation.cohorts import amplified, cohort
from fedmerge_peft.recipe import Recipe
from fedmerge_peft.runs import documents
from fedmerge_peft.strategies.differential_privacy import epsilon_spent
from fedmerge_peft.util import checked

LEDGER_FILE = "privacy.json"


class PrivacyLedger:
    """Releases of a run's clients, over all of its methods.

    On several ranks, every rank keeps the same counts, and rank 0 writes the file.

    Args:
        recipe: Recipe of the run: noise, δ, and the clients of a round.
        clients: Number of clients.
        simulated: True if the noise follows from the recipe's seed.
        directory: Run directory with the file of the ledger; None to keep it in memory.
    """

    def __init__(
        self, recipe: Recipe, clients: int, *, simulated: bool, directory: Path | None = None
    ) -> None:
        self._recipe = recipe
        self._clients = clients
        self._simulated = simulated
        self._path = directory / LEDGER_FILE if directory is not None else None
        self._times: dict[str, list[int]] = distributed.on_rank_zero(partial(_read, self._path))
        """Number of times that each round counts, from round 1 on, by name of the method."""
        self._selected = self._count()
        """Number of releases of each client, ``(clients,)``."""

    def check(self) -> None:
        """Raise ``RecipeError`` if computing ε needs the extra ``privacy``, which is missing."""
        rate = self._recipe.clients.fraction if amplified(self._recipe) else 1.0
        epsilon_spent(self._recipe.privacy, 1, rate)

    def begin(self, method: str, completed: int) -> None:
        """Set the counts of a method that continues after ``completed`` rounds.

        In a simulation, each completed round counts once. Across sites, the counts of the file are
        kept, and a completed round that the file lacks counts once.
        """
        times = self._times.get(method, [])
        if self._simulated:
            times = [1] * completed
        self._times[method] = times + [1] * (completed - len(times))
        self._selected = self._count()

    def charge(self, method: str, round: int) -> None:
        """Count a round of a method, before it starts.

        Raises:
            RunError: The file cannot be written; the round must not start.
        """
        times = self._times.setdefault(method, [])
        times += [0] * (round - len(times))
        if not (self._simulated and times[round - 1]):
            times[round - 1] += 1
            self._selected[self._cohort(round)] += 1
        if self._path is not None:
            document = {**self.document(), "releases": self._times}
            distributed.on_rank_zero(partial(checked.write_document, self._path, document))

    @property
    def epsilon(self) -> float:
        """ε of the client with the largest number of counted rounds (``_cohort``)."""
        rate = self._recipe.clients.fraction if amplified(self._recipe) else 1.0
        return epsilon_spent(self._recipe.privacy, int(self._selected.max(initial=0)), rate)

    def document(self) -> dict[str, Any]:
        """Return ε, δ and the source of the noise, for ``summary.json`` and the ledger's file."""
        return {
            "epsilon": self.epsilon,
            "delta": self._recipe.privacy.delta,
            "noise": noise_source(self._simulated),
        }

    def _count(self) -> NDArray[np.int64]:
        selected = np.zeros(self._clients, dtype=np.int64)
        for times in self._times.values():
            for number, count in enumerate(times, start=1):
                selected[self._cohort(number)] += count
        return selected

    def _cohort(self, round: int) -> list[int]:
        """Return the clients for which a round is counted.

        If the sample is secret, or ε is computed as if it were, these are all clients.
        """
        secret = self._recipe.clients.sampling == "poisson" and not self._simulated
        if secret or amplified(self._recipe):
            return list(range(self._clients))
        return cohort(self._recipe, self._clients, round)


def noise_source(simulated: bool) -> str:
    """Return the source of the noise, as it is written to records."""
    return "simulation" if simulated else "operating system"


def _read(path: Path | None) -> dict[str, list[int]]:
    if path is None or not path.exists():
        return {}
    try:
        times: dict[str, list[int]] = documents.read(path)["releases"]
    except RunError as error:
        fault = checked.without_remedy(error)
        remedy = str(error).removeprefix(fault)
        raise RunError(f"{fault}; ε is unknown without this file{remedy}") from error
    return times
