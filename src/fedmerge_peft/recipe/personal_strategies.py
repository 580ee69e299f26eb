"""Sections of strategies that build a client's model from parts of several clients' models."""

from __future__ import annotations

from pydantic import NonNegativeFloat

from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe.strategies import ServerRecipe


class FedPACRecipe(ServerRecipe):
    """A shared body, whose features are aligned with class centroids, and heads that each client
    combines from those of all clients (Xu et al. 2023, arXiv 2306.11867).
    """

    measures_features = True
    alignment: NonNegativeFloat = 1.0
    """lambda of the term lambda / d · ‖features − centroid of the class‖²."""


STRATEGIES.add("fedpac", "fedmerge_peft.strategies.fedpac:FedPAC", recipe=FedPACRecipe)
