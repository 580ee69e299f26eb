"""What the server does about hostile clients: a section of the recipe."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, PositiveFloat

from fedmerge_peft.plugins import AGGREGATIONS
from fedmerge_peft.recipe.registered import NameIn
from fedmerge_peft.recipe.section import Section

_RULES = {
    "mean": "Weighted mean; one client can move it anywhere.",
    "median": "Coordinate-wise weighted median.",
    "trimmed_mean": "Coordinate-wise weighted mean without the ends.",
    "krum": "The one update nearest to its neighbours.",
    "multi_krum": "Weighted mean of the updates nearest to their neighbours.",
    "cosine_filter": "Weighted mean of the updates that do not point against the others'.",
}
for _name, _about in _RULES.items():
    AGGREGATIONS.add(_name, f"fedmerge_peft.strategies.aggregation:{_name}", about=_about)

Minority = Annotated[float, Field(ge=0.0, lt=0.5)]


class RobustnessRecipe(Section):
    """How much a client can change of what others get."""

    aggregation: Annotated[str, NameIn(AGGREGATIONS)] = "mean"
    """How the clients' updates become one, for each adapter by what they count for it: the weighted mean, the coordinate-wise weighted
    median or trimmed mean (Yin et al. 2018, arXiv 1803.01498), the one update nearest to its neighbours (Krum), the mean of the nearest
    ones (multi_krum; Blanchard et al. 2017, arXiv 1703.02757), or the weighted mean of those that do not point against the others'
    (cosine_filter; Cao et al. 2021, arXiv 2012.13995, with the other clients in the place of the server's own data)."""
    trim: Minority = 0.2
    """Part of the weight that trimmed_mean cuts off at each end; more than the part of the clients that may be hostile."""
    malicious: Minority = 0.2
    """Part of an adapter's users that krum and multi_krum expect to be hostile."""
    norm_bound: PositiveFloat | None = None
    """Clip updates to this L2 norm; null for no fixed bound."""
    norm_multiple: PositiveFloat | None = None
    """Clip updates to this multiple of the running median of their L2 norms (of each round's clients, over the last five rounds); null for
    no such bound."""

    @property
    def defends(self) -> bool:
        """Whether it does anything else than weighted means."""
        return (
            self.aggregation != "mean"
            or self.norm_bound is not None
            or self.norm_multiple is not None
        )
