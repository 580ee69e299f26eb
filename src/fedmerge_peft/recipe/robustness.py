"""Section of robust aggregation, against malicious clients."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedmerge_peft.plugins import AGGREGATIONS
from fedmerge_peft.recipe.registered import NameIn
from fedmerge_peft.recipe.section import Norm, Section
from fedmerge_peft.recipe.strategy_base import StrategyRecipe

_RULES = {
    "mean": "Weighted mean; one client can move it anywhere.",
    "median": "Coordinate-wise weighted median.",
    "trimmed_mean": "Coordinate-wise weighted mean without the lowest and the highest values.",
    "krum": "The one update nearest to its neighbors.",
    "multi_krum": "Weighted mean of the updates nearest to their neighbors.",
    "cosine_filter": "Weighted mean of the updates that do not oppose the other updates.",
}
for _name, _about in _RULES.items():
    AGGREGATIONS.add(_name, f"fedmerge_peft.strategies.aggregation:{_name}", about=_about)
AGGREGATIONS.add(
    "similarity_filter",
    "fedmerge_peft.strategies.similarity_filter:similarity_filter",
    about="The cosine filter; clients whose updates are unusually similar share one vote.",
)

_BY_COLUMN = ("mean", "median", "trimmed_mean")
"""Rules that combine each column independently of the other columns."""

Minority = Annotated[float, Field(ge=0.0, lt=0.5)]


class RobustnessRecipe(Section):
    """Robust aggregation, which limits the influence of a client on the adapters of other
    clients.
    """

    aggregation: Annotated[str, NameIn(AGGREGATIONS)] = "mean"
    """Rule that combines the clients' updates, for each adapter. mean: the weighted mean. median
    and trimmed_mean: coordinate-wise and weighted (Yin et al. 2018, arXiv 1803.01498). krum: the
    one update nearest to its neighbors. multi_krum: the weighted mean of the updates that are
    nearest to their neighbors (both: Blanchard et al. 2017, arXiv 1703.02757). cosine_filter: the
    weighted mean of the updates with a positive cosine to the weighted sum of the other updates,
    each scaled to norm 1 (after Cao et al. 2021, arXiv 2012.13995, which compares with an update
    from the server's own data). similarity_filter: as cosine_filter, except that clients whose
    updates are unusually similar share one vote (after Fung et al. 2020, arXiv 1808.04866)."""
    trim: Minority = 0.2
    """Fraction of the clients' total weight that trimmed_mean removes at each end of the sorted
    values of a coordinate. Choose a value above the fraction of the weight that malicious clients
    may have."""
    malicious: Minority = 0.2
    """Fraction of malicious clients that krum and multi_krum assume among an adapter's clients."""
    norm_bound: Norm | None = None
    """Clip updates to this L2 norm; null for no bound."""
    norm_multiple: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None
    """Clip updates to this multiple of their typical L2 norm; null for no relative bound. The
    typical norm is the median, over the last five rounds, of the median norm of a round."""

    @property
    def defends(self) -> bool:
        """True if updates are clipped or combined by a rule other than the mean."""
        return (
            self.aggregation != "mean"
            or self.norm_bound is not None
            or self.norm_multiple is not None
        )

    def refusal(self, strategy: StrategyRecipe) -> str | None:
        """Return the reason why a strategy does not support the aggregation rule, or None."""
        if strategy.in_chunks and self.aggregation not in _BY_COLUMN:
            return (
                "strategy.soup: a soup in bfloat16 or on disk is computed in chunks of columns, "
                f"but robustness.aggregation: {self.aggregation} needs whole updates; remove soup, "
                f"or use one of the rules {', '.join(_BY_COLUMN)}"
            )
        return None
