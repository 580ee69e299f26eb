"""Cache of clients' scores, so that an adapter is scored only once.

With the strategy ``local``, for example, a round serves the adapter that the previous round scored
after training. Most strategies start a run with the same adapter.
"""

from __future__ import annotations

from collections.abc import Mapping

from fedmerge_peft.training.plan import Mixture, Served
from fedmerge_peft.util.digest import digest

_SCORES_PER_CLIENT = 8
"""Maximum number of models per client whose scores are cached. It suffices for a run that scores
three rounds, each before and after training, and the final adapters."""


class ScoreCache:
    """Cache of the scores of each client's most recently used models, by a digest of the model.

    It stores a few kilobytes per client, and no adapters.
    """

    def __init__(self) -> None:
        self._scores: dict[str, dict[bytes, dict[str, float]]] = {}
        """Scores by client and digest; the most recently used ones come last."""

    def find(self, client: str, key: bytes) -> dict[str, float] | None:
        """Return a copy of the client's scores with this ``score_key``; None if there are none."""
        known = self._scores.get(client, {})
        if key not in known:
            return None
        known[key] = known.pop(key)
        return dict(known[key])

    def store(self, client: str, key: bytes, scores: Mapping[str, float]) -> None:
        """Store the client's scores; if too many are stored, discard the least recently used."""
        known = self._scores.setdefault(client, {})
        known[key] = dict(scores)
        if len(known) > _SCORES_PER_CLIENT:
            del known[next(iter(known))]


def score_key(served: Served) -> bytes:
    """Return a digest of the served model. Only bit-identical models have equal digests."""
    return digest((served.rows, served.weights) if isinstance(served, Mixture) else (served,))
