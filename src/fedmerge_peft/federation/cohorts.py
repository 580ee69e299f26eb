"""Clients that take part in a round."""

from __future__ import annotations

import math

import numpy as np

from fedmerge_peft.recipe import Recipe
from fedmerge_peft.util.seeds import derive


def cohort_size(recipe: Recipe, clients: int) -> int:
    """Return the number of clients in a round, at least one."""
    return max(1, math.floor(recipe.clients.fraction * clients + 0.5))


def cohort(recipe: Recipe, clients: int, round: int) -> list[int]:
    """Return the indices of the clients selected for a round, ascending.

    Args:
        recipe: Fraction of clients, and seed.
        clients: Number of clients.
        round: Number of the round, from 1.
    """
    size = cohort_size(recipe, clients)
    if size == clients:
        return list(range(clients))
    generator = np.random.default_rng(derive(recipe.seed, "cohort", round))
    return sorted(int(client) for client in generator.choice(clients, size, replace=False))
