"""Cache of clients' scores, so that an adapter is scored only once.

With local training, for example, a round serves the adapter that the previous round scored after
training. Most strategies start a run with the same adapter.
"""

from __future__ import annotations

from collections.abc import Callable

from fedmerge_peft.training.plan import Mixture, Served
from fedmerge_peft.util.digest import digest

_SCORES_PER_CLIENT = 8
"""Maximum number of cached scores per client. It suffices for one run that scores three rounds,
each before and after training, and its final adapters."""


class ScoreCache:
    """Cache of scores of each client's most recently used adapters, by a digest of the adapter.

    It stores a few kilobytes per client, and no adapters.
    """

    def __init__(self) -> None:
        self._scores: dict[str, dict[bytes, dict[str, float]]] = {}
        """Scores by client and digest; the most recently used ones come last."""

    def get_or_compute(
        self, client: str, served: Served, compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return the client's scores; use cached ones if the served model is bit-identical.

        Args:
            client: Name of the client.
            served: Adapter or mixture to score.
            compute: Function that returns the scores. It is called if they are not in the cache.
        """
        key = digest((served.rows, served.weights) if isinstance(served, Mixture) else (served,))
        known = self._scores.setdefault(client, {})
        scores = known.pop(key) if key in known else compute()
        known[key] = scores
        if len(known) > _SCORES_PER_CLIENT:
            del known[next(iter(known))]
        return dict(scores)
