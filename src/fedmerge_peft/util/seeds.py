"""Random seeds derived from their purpose, independent of the order in which they are requested.

A client's random numbers depend on (seed, round, client) only. Order, batching, the number of
processes and interruptions do not change a client's result. Dropout masks of clients that train in
one forward pass are the exception: their seed is derived from the seeds of all of these clients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Derive a 63-bit seed, as in ``derive(recipe.seed, "train", round, client.name)``."""
    digest = blake2b(repr((seed, *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed torch's CPU generator, and that of a CUDA ``device``, inside the context.

    The earlier states of both generators are restored after it.
    """
    import torch

    devices = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.default_generators[devices[0].index or 0].manual_seed(seed)
        yield
