"""Cache of the scores of clients whose served adapter has not changed.

With local training, for example, the adapter that a round serves is the one that the previous round
has scored after training.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import torch
from torch import Tensor

from fedmerge_peft.training.plan import Mixture, Served


class ScoreCache:
    """Last scores of each client, with a digest of the adapter that they belong to.

    Stores a few hundred bytes per client and no adapters.
    """

    def __init__(self) -> None:
        self._last: dict[str, tuple[bytes, dict[str, float]]] = {}

    def get_or_compute(
        self, client: str, served: Served, compute: Callable[[], dict[str, float]]
    ) -> dict[str, float]:
        """Return the client's scores, from the cache if they are of a bit-identical adapter.

        Args:
            client: Name of the client.
            served: Adapter or mixture to score.
            compute: Function that returns the scores. It is called if the cache has none.
        """
        digest = _digest(served)
        last = self._last.get(client)
        if last is None or last[0] != digest:
            last = self._last[client] = digest, compute()
        return dict(last[1])


def _digest(served: Served) -> bytes:
    tensors: tuple[Tensor, ...] = (
        (served.rows, served.weights) if isinstance(served, Mixture) else (served,)
    )
    digest = blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()
