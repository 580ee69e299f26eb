"""Clients that take part in a round."""

from __future__ import annotations

import math
import secrets

import numpy as np
from numpy.typing import NDArray

from fedmerge_peft.recipe import Recipe
from fedmerge_peft.util.seeds import derive


def cohort_size(recipe: Recipe, clients: int) -> float:
    """Return the number of clients in a round, or its mean with ``clients.sampling: poisson``."""
    expected = recipe.clients.fraction * clients
    if recipe.clients.sampling == "poisson":
        return expected
    return max(1, math.floor(expected + 0.5))


def cohort(recipe: Recipe, clients: int, round: int, *, secret: bool = False) -> list[int]:
    """Return the indices of the clients selected for a round, ascending.

    Args:
        recipe: Fraction of clients, sampling, and seed.
        clients: Number of clients.
        round: Number of the round, from 1.
        secret: True to draw a Poisson sample from the operating system's generator, so that each
            call gives a new one. Samples of a fixed size always derive from the recipe's seed.
    """
    if recipe.clients.fraction == 1:
        return list(range(clients))
    seed = derive(recipe.seed, "cohort", round)
    generator = np.random.default_rng(seed)
    if recipe.clients.sampling == "poisson":
        draws = _secret_draws(clients) if secret else generator.random(clients)
        return [int(client) for client in np.flatnonzero(draws < recipe.clients.fraction)]
    size = int(cohort_size(recipe, clients))
    if size == clients:
        return list(range(clients))
    return sorted(int(client) for client in generator.choice(clients, size, replace=False))


def _secret_draws(count: int) -> NDArray[np.float64]:
    """Return uniform numbers in [0, 1), ``(count,)``, each from 53 bits of the operating system."""
    bits = np.frombuffer(secrets.token_bytes(8 * count), dtype=np.uint64)
    return (bits >> np.uint64(11)) / 2.0**53


def amplified(recipe: Recipe) -> bool:
    """Return True if the computation of ε includes amplification by sampling.

    This requires Poisson samples, and a trusted server that keeps them secret (``privacy.mode:
    central``). A simulation computes ε as if its samples were secret.
    """
    clients = recipe.clients
    return (
        recipe.privacy.mode == "central" and clients.sampling == "poisson" and clients.fraction < 1
    )
