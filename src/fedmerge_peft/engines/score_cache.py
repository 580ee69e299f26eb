"""Cache of the scores of clients for adapters that were scored before.

With local training, for example, the adapter that a round serves is the one that the previous round
has scored after training. The first adapter of a run is common to most strategies.
"""

from __future__ import annotations

from collections.abc import Callable

from fedmerge_peft.training.plan import Mixture, Served
from fedmerge_peft.util.digest import digest

_SCORES_PER_CLIENT = 8
"""Enough for one run that scores three rounds, each before and after training, and its end."""


class ScoreCache:
    """Scores of each client's most recently used adapters, by a digest of the adapter.

    Stores a few kilobytes per client and no adapters.
    """

    def __init__(self) -> None:
        self._scores: dict[str, dict[bytes, dict[str, float]]] = {}
        """By client and digest; the most recently used come last."""

    def get_or_compute(
        self, client: str, served: Served, compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return the client's scores; use cached ones if the adapter is bit-identical.

        Args:
            client: Name of the client.
            served: Adapter or mixture to score.
            compute: Function that returns the scores. It is called if the cache has none.
        """
        key = digest((served.rows, served.weights) if isinstance(served, Mixture) else (served,))
        known = self._scores.setdefault(client, {})
        scores = known.pop(key) if key in known else compute()
        known[key] = scores
        if len(known) > _SCORES_PER_CLIENT:
            del known[next(iter(known))]
        return dict(scores)
