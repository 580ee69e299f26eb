"""Sections of strategies that build a client's model from parts of several clients' models."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedmerge_peft.plugins import STRATEGIES
from fedmerge_peft.recipe import strategies as _  # noqa: F401 (registered first, so listed first)
from fedmerge_peft.recipe.section import Adapters, Coefficient, Count
from fedmerge_peft.recipe.strategy_base import ServerRecipe, StrategyRecipe


class FedPACRecipe(ServerRecipe):
    """A shared body, whose features are aligned with class centroids, and a head for each client
    that combines the heads of all clients (Xu et al. 2023, arXiv 2306.11867).
    """

    measures_features = True
    needs_labels = True
    alignment: Coefficient = 1.0
    """lambda of the term lambda / d · ‖features − centroid of the class‖², with d features."""


class FeMAMRecipe(StrategyRecipe):
    """A sum of models of several levels for each client: the global model, the models of its
    clusters, and its own model (Chen et al. 2026, arXiv 2405.16472).
    """

    adapters_key = "clusters"
    levels: Annotated[int, Field(ge=2, le=100)] = 3
    """Number of levels. Each level has a part of the rank, so `lora.r` must be at least this
    number."""
    clusters: Adapters = 5
    """Number of clusters in each level between the first and the last."""
    global_rounds: Count = 10
    """Rounds that train the first level, a global model."""
    level_rounds: Count = 5
    """Rounds that train each level between the first and the last. The remaining rounds train the
    last level, a model for each client."""


STRATEGIES.add("fedpac", "fedmerge_peft.strategies.fedpac:FedPAC", recipe=FedPACRecipe)
STRATEGIES.add("femam", "fedmerge_peft.strategies.femam:FeMAM", recipe=FeMAMRecipe)
